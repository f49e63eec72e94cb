"""What the README shows must run as it stands there."""

import pathlib
import re
import runpy

from kvjax import parse_strategy

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def listing() -> str:
    found = re.search(r"<!-- policy-listing -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_custom_policy_conforms_generates_and_has_a_spec(tmp_path, monkeypatch, capsys):
    path = tmp_path / "my_policies.py"
    path.write_text(listing())
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "bounded_chunks_stay_bounded: passed" in printed
    assert "skipped" not in printed
    assert re.search(r"\d+% kept", printed)

    monkeypatch.syspath_prepend(tmp_path)
    strategy = parse_strategy("my_policies:KeyNorm(keep=3)")
    assert strategy.policy.kept_tokens(100) == 3 + 10


def test_the_custom_policy_is_short():
    code = [line for line in listing().splitlines() if line.strip()]
    assert len(code) <= 40, f"{len(code)} lines"
