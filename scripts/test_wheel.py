"""Build the wheel and use it away from the source tree: what users install must not depend on this checkout."""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Runs inside the fresh environment. Its arguments: the environment, then every file that the package has in the source.
CHECK = """
import sys
from importlib import metadata, resources
from pathlib import Path
import saddlepoint

home, *expected = sys.argv[1:]
assert Path(saddlepoint.__file__).is_relative_to(home), f"imported from {saddlepoint.__file__}, not from the wheel"
package = resources.files("saddlepoint")
missing = [name for name in expected if not package.joinpath(name).is_file()]
assert not missing, f"the wheel lacks {missing}"
print(f"saddlepoint {metadata.version('saddlepoint')} from the wheel: imported, all {len(expected)} files present")
"""


def main() -> None:
    source = ROOT / "src" / "saddlepoint"
    files = [str(path.relative_to(source)) for path in sorted(source.rglob("*")) if path.is_file()]
    files = [name for name in files if "__pycache__" not in name]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        run([sys.executable, "-m", "build", "--wheel", "--outdir", str(home), str(ROOT)], ROOT, quiet=True)
        (wheel,) = home.glob("*.whl")

        # The dependencies come from the running environment by its path alone. A .pth file that lies there, such as the
        # one of the editable install, isn't read, so the source tree can't be imported by mistake.
        environment = home / "venv"
        venv.create(environment, with_pip=False)
        at = {name: sysconfig.get_path(name, "venv", {"base": str(environment)}) for name in ("purelib", "scripts")}
        Path(at["purelib"], "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        python = str(Path(at["scripts"], "python"))
        run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", str(wheel)], home)

        run([python, "-I", "-c", CHECK, str(environment), *files], home)
        run([str(Path(at["scripts"], "saddlepoint")), "--help"], home, quiet=True)
        print("saddlepoint --help runs")


def run(command: list[str], folder: Path, *, quiet: bool = False) -> None:
    """Run it in that folder, without the caller's PYTHONPATH; stop with its output if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, check=False, **output)
    if done.returncode:
        sys.exit(f"{done.stdout or ''}\nerror: {command[0]} failed with status {done.returncode}")


if __name__ == "__main__":
    main()
