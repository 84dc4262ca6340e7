"""Checkpoints: state, data iterator and step in one atomic, asynchronous orbax save; parts of another run's parameters.

workdir/checkpoints/<step>/{state,iterator,sums}   state = {"step", "params", "opt_state"}, params being the whole tree
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from vlm_jax import files
from vlm_jax.files import Path
from vlm_jax.settings.checks import ConfigError, RunEnded
from vlm_jax.storage import checksums
from vlm_jax.storage.run import checkpoint_folder

Tree = dict[str, Any]
MEND = "Free or mend the disk, then give the same command again."
LOOK_EVERY = 20.0  # seconds between looks whether a bucket that is written to can be reached


class Checkpoints:
    """The checkpoints of one training run. A save that is interrupted, even by kill -9, is discarded.

    A full disk or a folder that cannot be written raises a ConfigError: from `save`, or, if the background write fails, from
    the next `save` or from `close`. With several processes it is RunEnded instead. Checkpoints that were complete are kept.
    """

    def __init__(self, workdir: Path, keep: int):
        self._folder = checkpoint_folder(workdir)
        self._last = 0  # the step of the most recent save
        with files.writing(self._folder):
            self._folder.mkdir(exist_ok=True)
        self._manager = ocp.CheckpointManager(
            os.fspath(self._folder),
            item_names=("state", "iterator", "sums"),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def latest(self) -> int | None:
        """The newest step that was saved completely."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, iterator: Any) -> None:
        """Copies `state` to the host and returns; it is written in the background, at most one save at a time.

        `iterator` must have returned exactly the batches of steps 1..step.
        """
        self._finish()
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            iterator=grain.checkpoint.CheckpointSave(iterator),
            sums=ocp.args.JsonSave(checksums.of(state)),
        )
        self._last = step
        with self._saving():
            # Checked before orbax starts: it reports a folder that cannot be written only after minutes, and a disk that runs
            # full during the save with one traceback per array.
            files.check_room(self._folder, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            self._manager.save(step, args=arguments)

    def restore(self, step: int, abstract: Tree, iterator: Any) -> Tree:
        """The state of `step` in the shapes and shardings of `abstract`; sets `iterator` to its saved position.

        The mesh, the devices and the number of processes may differ from those of the save. Raises ConfigError when the
        position in the data has no equivalent for another number of processes, or when the checkpoint is damaged.
        """
        with _reading(self._manager, self._folder, step, "go on from"):
            iterator.set_state(self._position(step, iterator))
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            state = self._manager.restore(step, args=arguments)["state"]
            checksums.check(_sums(self._folder, step), state)
            return state

    def _position(self, step: int, iterator: Any) -> dict[str, Any]:
        """The state of this process's data iterator: the saved one, or its equivalent for another number of shards."""
        folder = self._folder / str(step) / "iterator"
        paths = sorted(folder.glob("process_*-of-*.json"))
        states = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
        if not states:
            raise FileNotFoundError(errno.ENOENT, "no position in the data", str(folder))
        name = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
        now = iterator.get_state().get("num_shards")
        if name in states and states[name].get("num_shards") == now:
            return states[name]
        return iterator.state_at(step, list(states.values()))

    def close(self) -> None:
        """Waits until the last save is written."""
        self._finish()
        self._manager.close()

    def _finish(self) -> None:
        if isinstance(self._folder, files.BucketPath):
            self._watch()
        with self._saving():
            self._manager.wait_until_finished()

    def _watch(self) -> None:
        """Waits for the save; ends the process when the bucket is gone, where tensorstore would try for a quarter of an hour."""
        looked = time.monotonic()
        while self._manager.is_saving_in_progress():
            time.sleep(0.02)
            if time.monotonic() - looked < LOOK_EVERY:
                continue
            try:
                self._folder.exists()
            except OSError as error:
                raise RunEnded(f"{self._unwritten(error)} {MEND}", exit_code=2) from error
            looked = time.monotonic()

    @contextlib.contextmanager
    def _saving(self) -> Generator[None, None, None]:
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1:
                # All processes take part in a save: the end of another one shows here as an error of any type.
                raise cannot_go_on(self._unwritten(error), self.latest()) from error
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise
            raise ConfigError(f"{self._unwritten(error)} {MEND}") from error

    def _unwritten(self, error: Exception) -> str:
        older = [step for step in self._manager.all_steps() if step < self._last]
        kept = f"that of step {max(older)} is complete" if older else "none was complete"
        return f"the checkpoint of step {self._last} could not be written to {str(self._folder)!r}: {files.reason(error)}; {kept}."


def cannot_go_on(what: str, saved: int | None) -> RunEnded:
    """The error of one of several processes that a failure stops; usually another process has ended first.

    saved: the step of the newest complete checkpoint.
    """
    return RunEnded(
        f"process {jax.process_index()} of {jax.process_count()} cannot go on: {what} | If another process ended first, its "
        f"log says why. The same command in every process goes on from step {saved or 0}.",
        exit_code=1,
    )


@contextlib.contextmanager
def _reading(
    manager: ocp.CheckpointManager, folder: Path, step: int, purpose: str
) -> Generator[None]:
    """Turns the errors of orbax and tensorstore for a damaged checkpoint into a ConfigError that names an older one."""
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_unraisable, hook)
    try:
        yield
        sys.unraisablehook = hook
    except (ConfigError, jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:
        older = [other for other in manager.all_steps() if other < step]
        left = f"{purpose} step {max(older)}" if older else "start anew: there is no older one"
        damaged = f"is damaged; delete {folder / str(step)} to {left}. It says: {files.reason(error)[:200]}"
        if jax.process_count() > 1:
            told = f"the checkpoint of step {step} cannot be read. Unless another process ended, it {damaged}"
            raise cannot_go_on(told, step) from error
        raise ConfigError(f"the checkpoint of step {step} {damaged}") from error


def _sums(folder: Path, step: int) -> dict[str, list]:
    """The checksums of a checkpoint; {} for one of an older version, which has none and is not checked."""
    path = folder / str(step) / "sums" / "metadata"
    return json.loads(path.read_text(encoding="utf-8")) if path.parent.is_dir() else {}


def _unraisable(hook: Callable[[Any], Any], what: Any) -> None:
    """Hides the tracebacks "Event loop is closed" that tensorstore's threads print for the reads that are still running when
    the first failure ends a restore. They may come late, so the hook stays installed after a failure."""
    if not (isinstance(what.exc_value, RuntimeError) and "loop is closed" in str(what.exc_value)):
        hook(what)


def save_params(workdir: str | Path, params: Tree, step: int = 0) -> None:
    """Saves parameters alone, in place of those that `workdir` held; no run can resume from them. step: 0 where they are of no run."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
    folder = checkpoint_folder(workdir)
    with ocp.CheckpointManager(
        os.fspath(folder), item_names=("state", "iterator"), options=options
    ) as manager:
        state = ocp.args.StandardSave({"params": params})
        manager.save(step, args=ocp.args.Composite(state=state))


def saved_names(workdir: str | Path, step: int | None = None) -> set[str]:
    """The paths of the parameters in a checkpoint, the newest one by default; none without a checkpoint."""
    folder = checkpoint_folder(workdir)
    if not folder.is_dir():
        return set()
    with ocp.CheckpointManager(
        os.fspath(folder),
        item_handlers={"state": ocp.PyTreeCheckpointHandler()},
        options=ocp.CheckpointManagerOptions(create=False, read_only=True),
    ) as manager:
        step = manager.latest_step() if step is None else step
        if step is None:
            return set()
        with _reading(manager, folder, step, "use"):
            return set(flatten_dict(manager.item_metadata(step)["state"].tree["params"], sep="/"))


def load_params(workdir: str | Path, abstract: Tree) -> Tree:
    """Parameters of the newest checkpoint of a training run, for the leaves of `abstract` only.

    abstract: ShapeDtypeStructs with shardings, nested as the parameters are.

    Raises ConfigError when there is no checkpoint, or for the first parameter that is missing or has another shape.
    """
    folder = checkpoint_folder(workdir)
    item = {"params": abstract}
    arguments = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    if not folder.is_dir():
        raise ConfigError(
            f"{str(workdir)!r} has no checkpoint; give the workdir of a training run."
        )
    handlers: dict[str, Any] = {
        "state": ocp.PyTreeCheckpointHandler(),
        "iterator": grain.checkpoint.CheckpointHandler(),
        "sums": ocp.JsonCheckpointHandler(),
    }
    with ocp.CheckpointManager(
        os.fspath(folder),
        item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(create=False, read_only=True),
    ) as manager:
        step = manager.latest_step()
        if step is None:
            raise ConfigError(
                f"{str(workdir)!r} has no finished checkpoint; give the workdir of a training run."
            )
        with _reading(manager, folder, step, "use"):
            saved = manager.item_metadata(step)["state"].tree["params"]
            _check_shapes(workdir, flatten_dict(saved, sep="/"), flatten_dict(abstract, sep="/"))
            restored = manager.restore(step, args=ocp.args.Composite(state=arguments))
            params = restored["state"]["params"]
            checksums.check(_sums(folder, step), {"params": params})
    for name, leaf in flatten_dict(params, sep="/").items():
        # orbax returns the ShapeDtypeStruct of a parameter that it did not find.
        if not isinstance(leaf, jax.Array):
            raise ConfigError(
                f"{str(workdir)!r}: parameter {name} was not restored; the checkpoint is damaged."
            )
    return params


def _check_shapes(workdir: str | Path, saved: Tree, wanted: Tree) -> None:
    for name, leaf in wanted.items():
        if name not in saved:
            raise ConfigError(
                f"{str(workdir)!r} has no parameter {name}; its model differs from this one."
            )
        if tuple(saved[name].shape) != tuple(leaf.shape):
            raise ConfigError(
                f"{str(workdir)!r}: parameter {name} has shape {tuple(saved[name].shape)} there but "
                f"{tuple(leaf.shape)} here; make the two models equal in this part."
            )
