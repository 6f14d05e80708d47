"""Where units of work run: in this process, or on the machines of a Ray cluster, with the same results bit for bit.

The engine cuts work into units that depend on their arguments alone: a run of a comparison, some rows of a layer, some
calibration batches. How it is cut says the recipe, never the machines. `docs/` beside this file shows how to start a
cluster.
"""

from quantlab.executors.local import LocalExecutor
from quantlab.executors.opening import ExecutorOptions, open_executor
from quantlab.executors.protocol import Executor, Link, Resources

__all__ = ["Executor", "ExecutorOptions", "Link", "LocalExecutor", "Resources", "open_executor"]
