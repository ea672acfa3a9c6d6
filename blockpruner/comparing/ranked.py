"""Methods that rank blocks by a statistic, with one pass over the text or one per removal, in one process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from blockpruner.comparing.method import Clock, Method
from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.strategies.greedy import Greedy
from blockpruner.engine.work.shape import ModelShape
from blockpruner.searching.config import SearchConfig
from blockpruner.showing.console import Reporter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from blockpruner.engine.methods.ranking import Measured
    from blockpruner.engine.model.decoder import Decoder


class Ranked(Method):
    statistic: ClassVar[str]
    """Name of the statistic, for messages."""
    blocks: ClassVar[Granularity]
    """What is ranked."""
    again: ClassVar[bool] = False
    """Whether the statistic is measured again after each removal."""

    @abstractmethod
    def measure(self, decoder: Decoder, windows: Tensor, mask: Mask, on_window: Callable[[], None]) -> Measured:
        """Measure the statistic of every block (or layer) that `mask` keeps. The lowest is removed first.

        windows: token ids [num_windows, seq_len]. on_window: call this after each window.
        """

    def told(self, common: SearchConfig, num_layers: int) -> SearchConfig:
        return common.replace(blocks=self.blocks, strategy=Greedy())

    def check(self, told: SearchConfig, model: PreTrainedModel, shape: ModelShape) -> None:
        told.space(shape)

    def run(self, told: SearchConfig, folder: Path, reporter: Reporter, clock: Clock) -> dict[str, Any]:
        from blockpruner.comparing.alone import alone, place
        from blockpruner.engine.methods.ranking import rank
        from blockpruner.engine.model.decoder_check import check_removable
        from blockpruner.engine.model.holding import devices_of, load_decoder

        with alone(self.statistic, told, reporter) as job:
            decoder = load_decoder(job.model, job.dtype, place(told, job), devices_of(job.device, 1))
            check_removable(decoder)
            mask, steps, num_windows = Mask(), list[dict[str, Any]](), job.windows.num_windows
            clock.loaded()

            def measure(mask: Mask) -> Measured:
                return self.measure(decoder, job.windows.tokens, mask, lambda: reporter.advance(1))

            num_passes = job.space.num_steps_left(mask) if self.again else 1
            with reporter.bar(self.statistic, num_windows * num_passes):
                for removal in rank(job.space, self.statistic, measure, again=self.again):
                    mask = mask.without(removal.block)
                    if self.again:  # the number of steps for a ratio is known only at the end
                        reporter.expect(reporter.done + num_windows * job.space.num_steps_left(mask))
                    steps.append(
                        {
                            "block": removal.block.to_json(), "ratio": job.shape.ratio(mask),
                            "search_s": clock.search_s(), "work_flops": removal.work_flops,
                        }
                    )  # fmt: skip
        return {"steps": steps}
