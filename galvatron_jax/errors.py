"""Every error a user can meet: what was got, what was expected, where it came from, what to do next.

Each class also subclasses the built-in exception that a user would try to catch, and carries the exit code with which a
command ends (0 done, 2 bad input, 3 infeasible, 4 environment, 5 numerical stop; 75 is a training run that was
preempted and saved, 130 an interrupted command).
"""

from __future__ import annotations


class GalvatronError(Exception):
    """Base of all errors raised for bad input or a bad environment (never for our own bugs)."""

    exit_code = 2

    def __init__(self, problem: str, *, expected: str = "", where: str = "", action: str = "") -> None:
        """State the problem in up to four parts.

        Args:
            problem: What was got, with its value.
            expected: What would have been right.
            where: File, key, flag or module path that the value came from.
            action: What the user can do next.
        """
        self.problem = problem
        self.expected = expected
        self.where = where
        self.action = action
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The four parts as one line (several lines when the problem itself lists several)."""
        parts = [f"{self.where}: {self.problem}" if self.where else self.problem]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.action:
            parts.append(self.action)
        return "; ".join(parts)


class ClusterError(GalvatronError, ValueError):
    """A cluster description that cannot be read or does not exist."""


class DocumentError(GalvatronError, ValueError):
    """A plan or profile file that is truncated, of another schema, or holds impossible values."""


class DocumentNotFoundError(GalvatronError, FileNotFoundError):
    """A plan or profile file or preset that does not exist."""


class PlanError(GalvatronError, ValueError):
    """A plan that contradicts itself or does not belong to the model or cluster at hand."""


class InfeasibleError(GalvatronError, ValueError):
    """Nothing in the stated space fits the memory budget."""

    exit_code = 3


class DeviceMismatchError(GalvatronError, RuntimeError):
    """The visible devices are not those that the plan was made for."""

    exit_code = 4


class BusyError(GalvatronError, BlockingIOError):
    """Another process is writing the same file."""

    exit_code = 4


class ToolchainError(GalvatronError, RuntimeError):
    """The compiler for another kind of device is not installed, failed or took too long."""

    exit_code = 4


class ModelError(GalvatronError, ValueError):
    """A model configuration whose sizes contradict each other."""


class AnalysisError(GalvatronError, ValueError):
    """A model or loss that cannot be traced or understood."""


class UnsupportedError(GalvatronError, NotImplementedError):
    """A plan or model that this version cannot run yet."""


class ConfigError(GalvatronError, ValueError):
    """A training configuration that cannot be read, contradicts itself, or is not the one of the run to resume."""


class DataError(GalvatronError, ValueError):
    """Training data that does not exist, is damaged beyond what may be skipped, or does not fit the model."""


class CheckpointError(GalvatronError, RuntimeError):
    """No checkpoint can be written, or none of those that exist is whole."""

    exit_code = 4


class NonFiniteError(GalvatronError, ArithmeticError):
    """Loss or gradients are NaN or infinite, and the run is to stop then."""

    exit_code = 5


class PreflightError(GalvatronError, RuntimeError):
    """The processes of a run do not agree on what to run, or some are missing."""

    exit_code = 4


class DeviceMemoryError(GalvatronError, MemoryError):
    """A plan that was predicted to fit ran out of device memory."""

    exit_code = 4


class DistributedError(GalvatronError, RuntimeError):
    """Processes that cannot be joined: the environment contradicts itself, a port is busy, a process absent."""

    exit_code = 4
