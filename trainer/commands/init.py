"""The command `init`: write a first experiment file."""

import argparse
import re
from pathlib import Path
from typing import Final

from trainer.commands.arguments import Subparsers, add_command, as_path
from trainer.commands.shipped import SCHEMA, shipped_names
from trainer.config.nodes import shown
from trainer.errors import ConfigError
from trainer.terminal import print_safe

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""The pattern of `name` in an experiment file."""

_TEMPLATE: Final = """\
# yaml-language-server: $schema={schema}
# A first experiment: a small mixture of experts, about a minute on two CPU cores.
#   turnout train {file}
# All keys and their defaults: turnout config show {file}
name: {name}                     # its run folder is runs/{name}

model:
  num_layers: 4
  d_model: 128
  num_heads: 4
  seq_len: 128                   # tokens of a training sequence
  tie_embeddings: true
  init_std: 0.08                 # about 1 / sqrt(d_model)
  moe:                           # `moe: null` is a dense model
    num_experts: 8
    d_ff: 176                    # width of one expert
    router: {{kind: top_k, top_k: 2}}
    balance: {{coef: 0.01}}        # weight of the load-balancing loss

data:
  sources:
    - {{kind: installed}}          # text of every Python installation; your own text instead:
    # - {{kind: text, path: "my_texts/*.txt", domain: mine}}
  tokenizer: {{kind: byte}}        # or {{kind: bpe, vocab_size: 8192}}, trained on your text

schedule: {{kind: warmup_cosine, peak_lr: 3e-3, warmup_steps: 0.1}}
train: {{steps: 300, global_batch_size: 32}}    # sequences of one optimizer step, over all ranks
eval: {{every: 100}}
parallel: {{micro_batch_size: 32}}              # sequences of one forward pass; lower it if memory runs out
checkpoint: {{every: 100}}
"""


def add(subparsers: Subparsers) -> None:
    """Add the command with its argument."""
    sub, what = add_command(subparsers, "init", init_command, example="my_first"), "name of the experiment (first)"
    sub.add_argument("name", nargs="?", type=as_path, default=Path("first"), metavar="NAME", help=what)


def init_command(options: argparse.Namespace) -> int:
    """Write a first experiment file, NAME.yaml, with comments."""
    given: Path = options.name
    path = given if given.suffix in (".yaml", ".yml") else given.with_name(f"{given.name}.yaml")
    if not _NAME.fullmatch(path.stem):
        raise ConfigError(f"init: {shown(path.stem)} is not a name; use letters, digits, '.', '_' and '-'")
    if path.stem in shipped_names():
        raise ConfigError(f"init: {path.stem} is a config of the package; choose another name")
    if not path.parent.is_dir():
        raise ConfigError(f"init: there is no folder {path.parent}; make it first, or give a name alone")
    text = _TEMPLATE.format(schema=SCHEMA, file=path, name=path.stem)
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: exists already; choose another name, or remove the file") from None
    print_safe(f"wrote {path}; train it with: turnout train {path}")
    return 0
