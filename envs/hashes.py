"""Write envs/hashes.txt from envs/lock.txt: python envs/hashes.py. Needs a package index.

pip is asked which files it would install for the lock on this machine; nothing is installed.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEAD = """\
# The digests of what envs/lock.txt installs on Linux x86-64 with Python 3.11, torch excepted: its
# CPU and CUDA builds differ. Written by envs/hashes.py. To install nothing but these very files:
#   pip install {torch}
#   pip install --no-deps --require-hashes -r envs/hashes.txt
"""


def pins(lock: str) -> list[str]:
    """The pinned packages of a lock."""
    return [line for line in lock.splitlines() if line and not line.startswith("#")]


def hashed(report: dict[str, Any]) -> list[str]:
    """A line with the digest for every file in a report of pip, by name."""
    lines = {}
    for item in report["install"]:
        about, archive = item["metadata"], item["download_info"]["archive_info"]
        name = about["name"].lower()
        lines[name] = f"{about['name']}=={about['version']} --hash=sha256:{_sha256(archive)}"
    return [lines[name] for name in sorted(lines)]


def _sha256(archive: dict[str, Any]) -> str:
    return str(archive["hashes"]["sha256"])


def main() -> None:
    """Ask pip, and write the file."""
    lock = pins((HERE / "lock.txt").read_text(encoding="utf-8"))
    torch = next(pin for pin in lock if pin.startswith("torch=="))
    wanted = [pin for pin in lock if pin != torch]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
    command += ["--ignore-installed", "--report", "-", *wanted]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    lines = hashed(json.loads(done.stdout))
    text = HEAD.format(torch=torch) + "".join(f"{line}\n" for line in lines)
    (HERE / "hashes.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
