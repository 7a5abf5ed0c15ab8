"""Run the first Python block of the README, as a reader would."""

import re
from pathlib import Path

readme = Path(__file__).parent.parent / "README.md"
blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
if not blocks:
    raise SystemExit("the README has no Python example")
exec(compile(blocks[0], str(readme), "exec"), {"__name__": "__main__"})
print("the README's example ran")
