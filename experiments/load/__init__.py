"""Studies of the serving engine under load."""
