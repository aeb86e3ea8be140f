"""Build the wheel, install it in a fresh environment, and run the program and its demonstration."""

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = ["hatchling", "build", "-t", "wheel", "-d", str(folder)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
        (wheel,) = folder.glob("*.whl")
        venv.create(folder / "venv", with_pip=True)
        binaries = folder / "venv" / "bin"
        install = [binaries / "pip", "install", "--quiet", f"{wheel}[local]"]
        subprocess.run(install, check=True)
        # Nothing of the checkout and of its environment may help.
        environment = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        raddle = str(binaries / "raddle")
        subprocess.run([raddle, "--version"], check=True, cwd=folder, env=environment)
        demo = subprocess.run(
            [raddle, "demo", "--output", "json"],
            check=True,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
        )
        result = json.loads(demo.stdout)
        for key in ("jobs", "incidents"):
            result.pop(key)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
