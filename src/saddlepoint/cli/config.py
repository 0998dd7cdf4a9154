"""`--config FILE.toml` for every command, and the configuration that was run, written back as TOML."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from saddlepoint.errors import InputError, UnknownNameError


def read(context: typer.Context, path: Path | None) -> Path | None:
    """Option callback: take the file's values as this command's defaults; options given on the command line win.

    Keys are the options' names. A table named like the command (`[evaluate]`) may hold them, so one file serves several.
    """
    if path is None:
        return None
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"--config: cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config: {path} is no valid TOML: {error}") from None
    values = document.get(context.info_name or "", {k: v for k, v in document.items() if not isinstance(v, dict)})
    known = {p.name: p for p in context.command.params if p.name not in ("config", "help", None)}
    defaults: dict[str, Any] = {}  # Any: options of any type
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UnknownNameError(f"option in {path}", key, [n.replace("_", "-") for n in known if n])
        defaults[name] = ",".join(map(str, value)) if isinstance(value, list) and not _many(known[name]) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _many(parameter: Any) -> bool:  # Any: click's own parameter type, which typer may vendor
    return bool(getattr(parameter, "multiple", False)) or parameter.nargs != 1


def ran(context: typer.Context) -> dict[str, Any]:
    """The values of all options of this run, ready for TOML and JSON."""
    values = {name: value for name, value in context.params.items() if name != "config" and value is not None}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def write(context: typer.Context, folder: Path) -> Path:
    """Write `config.toml` into the folder: `saddlepoint COMMAND --config` with it repeats the run."""
    lines = [f"# saddlepoint {context.info_name} --config config.toml", f"[{context.info_name}]"]
    lines += [f"{name.replace('_', '-')} = {json.dumps(value)}" for name, value in ran(context).items()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(help="TOML file with these options; the command line wins.", callback=read, is_eager=True),
]
