"""Serving: pages of a KV cache, continuous batching, sampling. Plain Python and torch; knows neither graphs nor kernels (docs/serving.md)."""

from attnopt.errors import ServingError
from attnopt.runtime.block_manager import BlockManager, OutOfPages, Usage
from attnopt.runtime.contexts import ContextCache
from attnopt.runtime.engine import CrossStepFunction, Engine, Event, Result, StepFunction
from attnopt.runtime.graphs import DecodeGraphs
from attnopt.runtime.paged_cache import LayerShape, PagedCache
from attnopt.runtime.request import Request
from attnopt.runtime.sampling import SamplingParams, sample
from attnopt.runtime.scheduler import Scheduler
from attnopt.runtime.statistics import Statistics
from attnopt.runtime.step import Step

__all__ = [
    "BlockManager",
    "ContextCache",
    "CrossStepFunction",
    "DecodeGraphs",
    "Engine",
    "Event",
    "LayerShape",
    "OutOfPages",
    "PagedCache",
    "Request",
    "Result",
    "SamplingParams",
    "Scheduler",
    "ServingError",
    "Statistics",
    "Step",
    "StepFunction",
    "Usage",
    "sample",
]
