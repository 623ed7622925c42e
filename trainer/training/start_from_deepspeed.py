"""Start a run from the weights of a DeepSpeed checkpoint."""

import sys
from contextlib import closing
from pathlib import Path

import torch

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.saver import Saved
from trainer.checkpoint.tools.import_deepspeed import read_deepspeed
from trainer.checkpoint.tools.translate import translate
from trainer.checkpoint.tools.weight_map import WeightMapConfig
from trainer.config.dump import dump
from trainer.console.console import Console
from trainer.data.corpus import build_tokenizer
from trainer.distributed.mesh import Mesh
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.models.initialize import expert_parameters
from trainer.training.model import meta_model, resolve_kernel, single_process
from trainer.training.setup import build_run


def start_from_deepspeed(
    config: ExperimentConfig, folder: RunFolder, source: Path, weight_map: WeightMapConfig, *, is_trusted: bool
) -> Saved:
    """Save the weights of a DeepSpeed checkpoint, which must have all of the model's, as step 0 of a new run."""
    if CheckpointFolder(folder.checkpoints).steps():
        raise ConfigError(f"{folder.checkpoints}: has checkpoints; start a new run with name=...")
    if config.init_from is not None:
        raise ConfigError("init_from: the first weights are those of the DeepSpeed checkpoint; set it to null")
    tensors = read_deepspeed(source, is_trusted=is_trusted)
    cpu, alone = torch.device("cpu"), single_process(config)
    model = meta_model(resolve_kernel(alone, cpu), build_tokenizer(config.data).vocab_size)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    num_experts = {name: shapes[name][0] for name in expert_parameters(model)}
    weights = translate(tensors, weight_map, shapes, num_experts)  # before anything is written
    folder.lock()
    with closing(Console(file=sys.stderr)) as console:
        run = build_run(alone, folder, console, Mesh.of_one(), cpu)
    folder.write(folder.config, dump(config))
    with torch.no_grad():
        for name, parameter in run.engine.model.named_parameters():
            parameter.copy_(weights[name])
    run.saver.start(0, run.engine.state(), run.checkpoint_info())
    saved = run.saver.wait()
    run.saver.close()
    assert saved is not None, "it was started"
    if saved.error is not None:
        raise saved.error
    return saved
