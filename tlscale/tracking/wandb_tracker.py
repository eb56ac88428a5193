"""W&B by its own library, such that it never prompts, never ends a run and takes along only what is ours to give.

Promise: offline when nobody is logged in or the network is gone; one run id over all segments of a run; records carry
their own step; files stay inside the run folder. No argv, no environment, no code, no git diff, no host or user name.
W&B's settings in the working folder are not read: they could have the key, and the run, sent to anybody.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from tlscale.errors import EXIT_STOPPED
from tlscale.recipe.schema import WandbSection
from tlscale.tracking.redact import reason, redact
from tlscale.tracking.working_folder import outside_working_folder, wandb_files, wandb_settings

STEP_KEY = "trainer/step"
"""The step of a record in W&B: its own step refuses to go back, so a resumed run would lose records."""

_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 300.0  # what is not uploaded by then is on the disk, and `wandb sync` takes it


class RunGroup(NamedTuple):
    """Show a run with others, as W&B does: those of a cross-validation."""

    name: str
    """Equal for all of them, and no others of the project."""
    job_type: str
    """What the run is among them."""


def new_run_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def environment(folder: Path) -> dict[str, str]:
    """Return variables such that W&B writes below the run folder; its settings and log-in are read where they are."""
    return {
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_DATA_DIR": str(folder / "data"),
        "WANDB_DISABLE_GIT": "true",  # of the working folder
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
    }


@contextmanager
def _own_settings() -> Iterator[None]:
    """Hide the settings in the working folder from W&B; that folder is left for no longer than it has to be."""
    with outside_working_folder() if wandb_files() else nullcontext():
        yield


@dataclass
class WandbSession:
    """Record one segment of a W&B run: from `start` to `close`."""

    section: WandbSection
    run_name: str
    run_dir: Path
    config: Mapping[str, Any]
    run_id: str
    note: Callable[[str], None]
    group: RunGroup | None = None
    """Unless W&B's own settings (`WANDB_RUN_GROUP`, `WANDB_JOB_TYPE`) name others."""
    name: str = "W&B"
    _run: Any = None

    def start(self) -> Self | None:
        """Start online if asked for, or if left open and somebody is logged in, else offline; None when disabled."""
        import wandb

        if files := wandb_files():
            asked = wandb_settings()
            keys = f" ({', '.join(sorted(asked))})" if asked else ""
            self.note(
                f"W&B: not read, as they lie in the working folder, which may be anybody's: "
                f"{', '.join(map(str, files))}{keys}. What is yours belongs into ~/.config/wandb/settings or the "
                "environment (WANDB_BASE_URL, ...)"
            )
        mode, why = _mode(self.section)
        if mode == "disabled":
            self.note(f"W&B: off ({why})")
            return None
        try:
            self._run = self._init(mode)
        except Exception as error:
            if mode == "offline" or wandb.run is not None:
                raise
            why = f"the start online failed, {reason(error)}"
            wandb.teardown()  # the failed start keeps the run id until its service has ended
            mode, self._run = "offline", self._init("offline")
        self._run.define_metric(STEP_KEY)
        self._run.define_metric("*", step_metric=STEP_KEY)
        if mode == "offline":
            folder = shlex.quote(str(self._run.settings.sync_dir))
            self.note(f"W&B: offline ({why}); to upload later: wandb sync {folder}")
        else:
            self.note(f"W&B: {self._run.url}")
        return self

    @_own_settings()
    def _init(self, mode: Literal["online", "offline"]) -> Any:  # noqa: ANN401 (wandb is not typed)
        import wandb

        users = _load_settings()
        return wandb.init(
            project=redact(self.section.project),
            entity=redact(self.section.entity),
            name=redact(self.run_name),
            group=None if self.group is None or users.run_group else redact(self.group.name),
            job_type=None if self.group is None or users.run_job_type else self.group.job_type,
            tags=redact(self.section.tags),
            id=self.run_id,
            resume="allow",
            config=dict(self.config),
            allow_val_change=True,
            settings=wandb.Settings(
                mode=mode,
                root_dir=str(self.run_dir),
                reinit="create_new",  # in a notebook the user may have a run of their own
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", _INIT_TIMEOUT_S)),
                finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", _FINISH_TIMEOUT_S)),
                stop_fn=_stop_run,
                x_transaction_log_flush_interval=5.0,
                **_PRIVATE,
            ),
        )

    def log(self, record: Mapping[str, float], step: int) -> None:
        self._run.log({**record, STEP_KEY: step})

    def summary(self, figures: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(figures))

    def close(self, exit_code: int) -> None:
        if exit_code == EXIT_STOPPED:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)

    def abandon(self) -> None:
        """Tear down: otherwise W&B tries again when Python exits, and prints a traceback."""
        import wandb

        wandb.teardown(exit_code=1)


# What W&B would take with it: argv, host, user, git remote and diff, code, package list, console. Its system figures
# (load, memory, GPU) stay on; they name nobody.
_PRIVATE: dict[str, Any] = {
    "host": "-",
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "sagemaker_disable": True,
    "save_code": False,
    "silent": True,
    "symlink": False,
    "x_disable_meta": True,
    "x_save_requirements": False,
}


def _mode(section: WandbSection) -> tuple[Literal["online", "offline", "disabled"], str]:
    """Return the mode and the reason for it; never prompt, never use the network."""
    settings, wish = _load_settings(), wandb_settings().get("mode", "")
    asked = os.environ.get("WANDB_MODE")
    who = f"WANDB_MODE={asked}" if asked else f"the recipe sets 'wandb.mode: {section.mode}'"
    mode = asked or (section.mode if section.mode != "auto" else settings.mode)
    if not asked and section.mode == "auto" and wish in ("offline", "dryrun", "disabled"):
        return "offline", "W&B's settings in the working folder ask for it"
    if mode == "disabled":
        return "disabled", who
    if mode in ("offline", "dryrun"):
        return "offline", who if asked or section.mode != "auto" else "W&B's settings ask for it"
    try:
        logged_in = _is_logged_in(settings.base_url)
    except Exception as error:  # a broken key, or another version of wandb
        return "offline", f"the log-in cannot be used, {reason(error)}"
    return ("online", who) if logged_in else ("offline", "nobody is logged in")


def _load_settings() -> Any:  # noqa: ANN401
    """Return W&B's settings for this process: the user's and the environment's, and not those of the working folder."""
    import wandb

    here = os.getcwd()
    with _own_settings():
        settings = wandb.setup().settings
        if settings.root_dir == os.getcwd():
            settings.root_dir = here  # as it would be, for runs of the user's own in this process
    return settings


def _is_logged_in(base_url: str) -> bool:
    """Return whether W&B finds a key by its own means: the environment, netrc, its settings file."""
    from wandb.sdk.lib import wbauth

    return wbauth.authenticate_session(host=base_url, source="tlscale", prompt=False, update_session=False) is not None


def _stop_run() -> None:
    """Obey the stop button of W&B's page: SIGTERM where it is handled, so that the run saves itself first."""
    handled = callable(signal.getsignal(signal.SIGTERM))
    os.kill(os.getpid(), signal.SIGTERM if handled else signal.SIGINT)
