"""The command `kvjax`.

kvjax fetch smollm2-135m      gets a public model into the cache folder
kvjax run --compare=full,h2o  the same as python -m kvjax.run; also plan, advise, calibrate, train, report
"""

import runpy
import sys
from collections.abc import Callable, Mapping

from kvjax.command import end_well, fail

PROGRAMS = {name: f"kvjax.{name}" for name in ("run", "plan", "advise", "calibrate", "train", "report")}
"""Subcommands that are programs of their own."""


def fetch(arguments: list[str]) -> None:
    """Fetches the named models and prints where they are."""
    from kvjax.models.progress import shown
    from kvjax.models.public import DESCRIPTION, PUBLIC, home
    from kvjax.models.public import fetch as fetch_one

    if not arguments or {"-h", "--help", "--helpshort", "--helpfull"} & set(arguments):
        print(f"kvjax fetch NAME...\n\nGets public models into {home()} (KVJAX_HOME says where else), by pip.\n\n    {DESCRIPTION}")
        sys.exit(0 if arguments else 2)
    for name in arguments:
        if name not in PUBLIC:
            fail(f"nothing to fetch under the name {name!r}; there is: {', '.join(PUBLIC)}")
    for name in arguments:
        model = PUBLIC[name]
        with shown() as report:
            path = fetch_one(model, report)
        print(f"{name}: {path} (weights {model.source.weights}, licence {model.source.license})")


COMMANDS: Mapping[str, Callable[[list[str]], None]] = {"fetch": fetch}
"""Subcommands that are functions, given the arguments after their name."""


def main() -> None:
    """Runs the subcommand that the first argument names."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name in PROGRAMS:
        sys.argv = [f"kvjax {name}", *arguments]
        runpy.run_module(PROGRAMS[name], run_name="__main__", alter_sys=True)
        return
    if name in ("", "-h", "--help"):
        print((__doc__ or "").strip())
        sys.exit(0 if name else 2)
    if name not in COMMANDS:
        fail(f"there is no command {name!r}; there are: {', '.join([*COMMANDS, *PROGRAMS])}")
    end_well(lambda: COMMANDS[name](arguments))


if __name__ == "__main__":
    main()
