"""Write docs/configuration.md: every key of a configuration with its type, default and meaning.

python scripts/config_page.py            writes the page
python scripts/config_page.py --check    says whether it is up to date, exit 1 if not
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from liger_cli.config import ALIASES, RunConfig, find_problems, resolve_config
from liger_cli.config.describe import allowed, default_text, group

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"

_HEAD = """# Configuration

Made from `liger_cli/config/keys.py` by `python scripts/config_page.py`; do not edit.

A run is described by one flat set of keys. Their names are those of Hugging Face's
`TrainingArguments`, plus `model`, `ops` and `dataset`. A key comes from, the last one winning:

1. its default,
2. a YAML file: `-c train.yaml`,
3. `--set key=value`, which may be repeated; the value is read as YAML,
4. a flag: `gradient_accumulation_steps` is `--gradient-accumulation-steps`; a key that is true or
   false is switched off by `--no-`, as in `--no-bf16`.

`liger config show` prints every key as a run would take it, and with `--sources` where each value
comes from:

```
$ liger config show -c configs/train/sft.yaml --set seed=4 --seed 3 --sources
...
{show}
...
```

A key that does not exist, a value of the wrong type, a repeated key, a section or a file that is
not YAML stops the command with exit code 2 before anything is loaded. Every problem is named at
once, with file, line, column and the nearest key:

```
{problems}
```

Anchors and aliases (`&x`, `*x`), tags, more than 20 levels and more than 256 kB are refused in the
same way, in presets and in the config.yaml of a run too.

`--ignore-unknown-keys` turns unknown keys of a file or of `--set` into warnings.

| command | what it does |
|---|---|
| `liger config init FILE --template NAME` | copies a file of `configs/train` to start from |
| `liger config validate FILE...` | names every problem of the files; exit 2 if there is one |
| `liger config show` | every key, its value and its source; `--json` |
| `liger config schema` | the JSON schema of a file |

An editor with the YAML language server completes and checks the keys: write the schema once with
`liger config schema > liger.schema.json`, and as the first line of the file

```
# yaml-language-server: $schema=liger.schema.json
```

YAML is read strictly: no tags, no merge keys, no dates; `010` and `1:30` are text and `1e-4` is a
number. The `config.yaml` of a run's directory holds every key as it was resolved, so
`liger train -c runs/mine/config.yaml --output-dir runs/again` repeats the run.
"""

_TABLE = """
## {group}

| key | type | default | meaning |
|---|---|---|---|
"""

# A file with a mistake of each common kind; the page shows what is said about it.
_MISTAKES = """\
model: llama
learning_rat: 1e-4
training: {max_steps: 100}
max_length: long
bf16: true
fp16: true
"""


def page() -> str:
    """Return the text of docs/configuration.md."""
    text = _HEAD.format(show=_show_example(), problems=_problems_example())
    for heading, names in groupby(RunConfig.model_fields, key=group):
        text += _TABLE.format(group=heading) + "".join(map(_row, names))
    return text


def _row(name: str) -> str:
    aliases = "".join(f", `{alias}`" for alias, key in ALIASES.items() if key == name)
    default = f"`{default_text(name)}`" if default_text(name) else "must be given"
    meaning = RunConfig.model_fields[name].description
    return f"| `{name}`{aliases} | {allowed(name)} | {default} | {meaning} |\n"


def _show_example() -> str:
    resolved = resolve_config(ROOT / "configs/train/sft.yaml", {"seed": 3}, ["seed=4"])
    lines = resolved.to_yaml(with_sources=True).replace(f"{ROOT}/", "").splitlines()
    return "\n".join(line for line in lines if line.startswith(("max_steps", "seed", "bf16")))


def _problems_example() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.yaml"
        path.write_text(_MISTAKES)
        return "\n".join(find_problems(path)).replace(f"{folder}/", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif not PAGE.is_file() or PAGE.read_text() != page():
        print(f"{PAGE} is out of date: run python scripts/config_page.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
