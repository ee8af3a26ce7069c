"""What `deperceiver train` does, in the order in which it does it."""

import contextlib
import sys
from collections.abc import Sequence

import jax
from absl import flags

from deperceiver_jax.data import TrainBatches, open_source
from deperceiver_jax.data.classes import require_same_classes
from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.coco_metric import SUMMARY
from deperceiver_jax.evaluation.evaluate import (
    evaluate,
    evaluation_batches,
    evaluation_views,
    make_detect_step,
    write_results,
)
from deperceiver_jax.files import as_path, is_bucket, require_writable
from deperceiver_jax.models import field_needs
from deperceiver_jax.program import processes
from deperceiver_jax.program.command_line import parse_config
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.program.shutdown import Shutdown
from deperceiver_jax.runs.stored_evaluation import check_evaluated
from deperceiver_jax.runs.workdir import check_data, check_workdir, data_fingerprint, keep_others_out, write_workdir
from deperceiver_jax.sharding import make_mesh, shard_batch
from deperceiver_jax.training.build import build_training
from deperceiver_jax.training.check_sizes import check_sizes
from deperceiver_jax.training.checkpoint import Checkpoints, newest_whole
from deperceiver_jax.training.compile_ahead import compile_sizes
from deperceiver_jax.training.diagnosis import because, circumstances, does_not_learn, likely_reason
from deperceiver_jax.training.metric_log import MetricLog
from deperceiver_jax.training.overfit import OVERFIT, few_pictures, overfit_verdict, train_on_few
from deperceiver_jax.training.pace import Pace
from deperceiver_jax.training.start import describe_run, find_start, first_state, settle_backbone_weights
from deperceiver_jax.training.timetable import due, ends_early, last_step
from deperceiver_jax.training.trackers import check_trackers
from deperceiver_jax.training.train_state import inference_arrays
from deperceiver_jax.training.train_step import check_parts, non_finite_term
from deperceiver_jax.visualize.detections import drawn_images


def train(values: flags.FlagValues, config_arguments: Sequence[str]) -> bool:
    """The program. values: the flags of deperceiver_jax/train.py; config_arguments: `--config...`. Raises UserError.

    Whether it was stopped before its last step, and the same command continues it.
    """
    with contextlib.ExitStack() as until_end:
        return _train(values, config_arguments, until_end)


def _train(values: flags.FlagValues, config_arguments: Sequence[str], until_end: contextlib.ExitStack) -> bool:
    """What `until_end` has entered is left however the program ends."""
    # Chapter 1: the config. Nothing is written before chapter 6, but for the lock of a workdir that is there.
    config = parse_config(config_arguments, needs=field_needs)
    if overfit := config.train.overfit:
        train_on_few(config)
    if not values.workdir:
        raise UserError("--workdir is missing: the directory that the run shall live in.")
    workdir = as_path(values.workdir)
    if is_bucket(workdir):
        require_writable("--workdir", workdir)
    given = any(argument.lstrip("-").startswith("config.model.backbone.weights=") for argument in config_arguments)
    settle_backbone_weights(config, workdir, given)
    if not workdir.exists():
        find_start(config)

    # Chapter 2: devices.
    processes.join(values)
    keep_compiled(config.train.compilation_cache)
    mesh = make_mesh(config.mesh.model)
    check_parts(config.data.batch_size, config.optimizer.accumulate_steps, mesh)

    # Chapter 3: data. Its position is the number of finished steps.
    source = open_source(config.data, config.data.train_split)
    if overfit:
        source = few_pictures(source, overfit)
        eval_source, eval_split = source, OVERFIT
    else:
        eval_split = config.data.eval_split
        eval_source = open_source(config.data, eval_split)
        require_same_classes(source.classes, config.data.train_split, eval_source.classes, eval_split)
        if not eval_source.annotated:
            raise UserError(f"Split {eval_split} of {config.data.directory} has no annotations to evaluate with.")
    config.model.num_classes = source.classes.num_slots
    check_workdir(workdir, config, source.classes)
    first, new = jax.process_index() == 0, not workdir.exists()
    if first:
        data, eval_data = data_fingerprint(source), data_fingerprint(eval_source)
        if not config.data.allow_changed:
            check_data(workdir, data)
            check_evaluated(workdir, eval_data)
        if not new:
            until_end.enter_context(keep_others_out(workdir))
    start, damaged = newest_whole(workdir)
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    batches = TrainBatches(source, config.data, seed=config.seed, start_step=start, **hosts)
    per_epoch = batches.steps_per_epoch
    num_steps = last_step(config.train, per_epoch)
    is_evaluated = due(config.train, "eval_every", per_epoch, num_steps)
    is_saved = due(config.train, "checkpoint_every", per_epoch, num_steps)
    check_trackers(config.train.trackers, workdir)

    # Chapter 4: the model and its two jitted steps.
    plan, _, _, train_step = build_training(config, mesh, steps_per_epoch=per_epoch, num_steps=num_steps)
    detect_step = make_detect_step(plan.skeleton.merge, config, mesh)
    eval_batches = evaluation_batches(eval_source, config, mesh, evaluation_views(eval_source, config))
    sizes = [*batches.buckets, *eval_batches.buckets]
    check_sizes(plan.skeleton.merge, inference_arrays(plan.abstract), sizes, mesh)

    # Chapter 5: the state: the newest checkpoint's, or a first one.
    checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints)
    if start:
        checkpoints.set_aside(damaged, start)
        state, progress = checkpoints.restore(start, plan.abstract)
    else:
        state, progress = first_state(plan, config, source.classes), None
    steps = range(start + 1, num_steps + 1)
    known = circumstances(config, plan, state, source)

    # Chapter 6: the workdir, and what will happen.
    if first:
        if new:
            until_end.enter_context(keep_others_out(workdir, new=True))
        write_workdir(workdir, config, source.classes, data)
        print(describe_run(config, state, source, batches, steps), flush=True)
    log = MetricLog(workdir, config, steps=steps, steps_per_epoch=per_epoch, writes=first, progress=progress)

    # Chapter 7: the step of every size, compiled, and training, with checkpoints and evaluations at their times.
    shutdown = Shutdown()

    def note(step: int, metrics: dict[str, jax.Array]) -> None:
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if term := non_finite_term(metrics):
            kept = f"the checkpoint of step {last}" if (last := checkpoints.latest_step()) else "no checkpoint yet"
            sentence = f"{term} is {metrics[term]} in step {step}, where the run stops; {workdir} has {kept}."
            rows = [*log.training_lines(), {"step": step, **metrics}]
            raise UserError(sentence + because(likely_reason(known, rows)))
        log.training(step, metrics)

    def evaluate_now(step: int) -> None:
        if shutdown.requested:
            return
        with log.paused():
            with shutdown.interrupts():
                metrics, results = evaluate(detect_step, inference_arrays(state), eval_source, config, mesh)
                if first:
                    place = workdir / "eval" / str(step)
                    write_results(place / OVERFIT if overfit else place, metrics, results, eval_data)
                log.evaluation(eval_split, {name: metrics[name] for name in SUMMARY})
            if first and log.has(step, eval_split):
                show(results)

    def show(results: list[dict]) -> None:
        """What process 0 tells of an evaluation beside its metrics."""
        if config.train.trackers:
            log.images(eval_split, drawn_images(eval_source, results))
        if not overfit:
            rows, evaluations = log.training_lines(), log.lines(eval_split)
            if sentence := does_not_learn(known, rows, evaluations, results, eval_source, last=num_steps):
                print(f"warning: {sentence}", file=sys.stderr, flush=True)

    with contextlib.closing(log), checkpoints, contextlib.closing(iter(batches)) as stream:
        if start and is_evaluated(start) and not log.has(start, eval_split):
            evaluate_now(start)  # the run before stopped after that checkpoint, but before its evaluation was done
        ended = ends_early(config.train, log.lines(eval_split))
        if ended:
            steps = range(0)
        if steps:
            with log.paused():
                train_step = compile_sizes(train_step, plan.abstract, batches, config.data.batch_size, mesh)
        # Waiting for the last step's metrics would let the devices wait for the host: they are read after the next step
        # has begun, or where they are there at once, as CPUs often have them. The log's rates are of finished steps.
        unread = []
        pace = Pace()
        for step, batch in pace.over(steps, stream):
            if shutdown.before(step):
                break
            state, metrics = train_step(state, shard_batch(batch, mesh))
            unread.append((step, metrics))
            pause = is_evaluated(step) or is_saved(step)
            there = jax.process_count() == 1 and all(value.is_ready() for value in metrics.values())
            while len(unread) > (not (pause or there)):
                note(*unread.pop(0))
            if pause:
                pace.skip()
                checkpoints.save(state, log.progress())
            if is_evaluated(step):
                evaluate_now(step)
                if ended := ends_early(config.train, log.lines(eval_split)):
                    break
        for step, metrics in unread:
            note(step, metrics)
        if log.step > start:
            checkpoints.save(state, log.progress())

    # Chapter 8: what there is now.
    stopped = shutdown.requested or (log.step < num_steps and not ended)
    if first:
        done = "Stopped: the same command continues" if stopped else "Finished"
        why = f", because {ended}" if ended else ""
        print(f"{done} after step {log.step} of {num_steps}{why}: {checkpoints.directory}/{log.step}", flush=True)
    if overfit and not stopped:
        verdict = overfit_verdict(known, log.training_lines(), log.lines(eval_split))
        if not ended:
            raise UserError(verdict)
        if first:
            print(verdict)
    return stopped
