"""Run one part: `python -m benchmarks.gpu.alone NAME SETTING`. It prints what it found as its last line."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

from benchmarks.gpu.part import Report, Setting, tell


def main() -> None:
    name, given = sys.argv[1:]
    values = json.loads(given)
    setting = Setting(**{**values, "folder": Path(values["folder"])})
    report = Report()
    for step in importlib.import_module(f"benchmarks.gpu.{name}").STEPS:
        try:
            step(setting, report)
        except Exception as error:
            traceback.print_exc()
            report.add(f"{name}: {step.__name__}", "ends", f"{type(error).__name__}: {error}"[:300], is_kept=False)
        tell(report)


if __name__ == "__main__":
    main()
