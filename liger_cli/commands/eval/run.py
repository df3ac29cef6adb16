"""Evaluate a model, from a configuration to a report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from liger_cli.config import RunConfig
from liger_cli.report import RunReport, TrainProgress, notify, show_patched
from liger_cli.report.build import add_evaluation, report_of
from liger_cli.report.required_ops import parse_ops
from liger_cli.training.document_check import check_documents
from liger_cli.training.evaluate import evaluate_inputs
from liger_cli.training.inputs import Inputs, load_inputs
from liger_cli.training.launch.agreement import check_same_data, check_same_launch
from liger_cli.training.memory.limits import check_memory
from liger_cli.training.model.adapters import adapts
from liger_cli.training.model.source import resolve_model
from liger_cli.training.objectives.objective import Setting
from liger_cli.training.objectives.table import make_objective, resolve_objective
from liger_cli.training.parallel.engine import Engine, make_engine
from liger_cli.training.parallel.mesh import ParallelPlan, explicit_plan
from liger_cli.training.parallel.refusals import check_inputs, check_sharded
from liger_cli.training.runtime.launch import make_accelerator, quiet_libraries
from liger_cli.training.runtime.launch_variables import config_of_launch

__all__ = ["run_eval"]


def run_eval(config: RunConfig) -> RunReport | None:
    """Evaluate a model and return the report; None on processes other than the main one.

    Raises:
        LigerError: Anything a user can mend.
    """
    config = config_of_launch(config, notify)
    parse_ops(config.ops)
    quiet_libraries()
    source = resolve_model(config.model, notify)
    is_adapted = adapts(config, source, trains=False)
    accelerator = make_accelerator(config, adapts=is_adapted)
    check_same_launch(config, accelerator)
    is_main = accelerator.is_main_process
    device = accelerator.device
    inputs = load_inputs(config, source=source, device=device, trains=False, notify=notify)
    if accelerator.num_processes > 1:
        check_same_data(inputs.identities, accelerator)
    config = resolve_objective(config, inputs, trains=False)
    engine = _make_engine(config, inputs, accelerator)
    check_memory(config, inputs.meta_model, device, trains=False)
    say: Callable[[str], None] = notify if is_main else lambda line: None
    loaded_as = inputs.attention.applied(config)
    model, record = engine.load(loaded_as, inputs.source, say, trains=False)
    with engine.evaluation(model):
        inputs = check_documents(config, inputs, model, accelerator, say)
    objective = make_objective(config, model, device)
    model = engine.prepare_evaluated(model)
    inputs = objective.prepare(Setting(config, accelerator, engine, model, inputs, notify=say))
    if is_main:
        show_patched(report_of("eval", config, inputs, record))
    rows_at_once = config.per_device_eval_batch_size * accelerator.num_processes
    num_batches = sum(math.ceil(len(rows) / rows_at_once) for rows in inputs.eval.values())
    done = itertools.count(1)
    with TrainProgress(num_batches, description="eval") as progress:

        def show() -> None:
            if (number := next(done)) % config.logging_steps == 0:
                progress.update(number)

        result = evaluate_inputs(
            config,
            objective,
            model,
            inputs,
            accelerator,
            record=record,
            on_batch=show if is_main else None,
        )
    accelerator.end_training()
    if not is_main:
        return None
    report = report_of("eval", config, inputs, record)
    add_evaluation(report, result)
    return report


def _make_engine(config: RunConfig, inputs: Inputs, accelerator: Any) -> Engine:
    """Return the engine of an evaluation: without a key every rank has a copy of the model."""
    num_processes = accelerator.num_processes
    plan = explicit_plan(config, num_processes) or ParallelPlan(dp_replicate=num_processes)
    if plan.is_sharded:
        check_sharded(config, inputs.source, accelerator.device)
        check_inputs(inputs)
    return make_engine(accelerator, plan)
