"""Run the Python blocks of the README in turn, as a reader would."""

import re
from pathlib import Path

readme = Path(__file__).parent.parent / "README.md"
blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
if not blocks:
    raise SystemExit("the README has no Python example")
for block in blocks:
    exec(compile(block, str(readme), "exec"), {"__name__": "__main__"})
print(f"the README's {len(blocks)} examples ran")
