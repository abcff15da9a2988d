"""With SAMER_FAULT_LOG: a line on files of tests whose tests are themselves the cases."""

import json
import os
from collections import Counter

COUNTED = {"test_no_code.py": "code in data"}
results: dict[str, Counter] = {name: Counter() for name in COUNTED.values()}


def pytest_runtest_logreport(report):
    group = COUNTED.get(os.path.basename(report.location[0]))
    if group and report.when == "call":
        results[group].update([report.outcome])
        results[group]["seconds"] += report.duration


def pytest_sessionfinish():
    if log := os.environ.get("SAMER_FAULT_LOG"):
        with open(log, "a", encoding="utf-8") as lines:
            for group, count in results.items():
                if cases := count["passed"] + count["failed"]:
                    row = {"group": group, "cases": cases, "survived": count["passed"], "bytes_lost": 0}
                    lines.write(json.dumps({**row, "seconds": round(count["seconds"], 2)}) + "\n")
