"""The README's Python example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_first_example_runs() -> None:
    first = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    names: dict = {}
    exec(compile(first, str(README), "exec"), names)
    assert names["loss"].shape == names["todi"].shape == (2, 16)
    assert names["student_logits"].grad.abs().sum() > 0
