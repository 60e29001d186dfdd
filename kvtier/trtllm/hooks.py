"""Whether the engine's hooks in front of the layers can be counted on."""

from __future__ import annotations

from kvtier.trtllm.fields import as_text, dig

_ABSENT = object()


class LayerHooks:
    """Knows whether every pass that loads runs the hook of each layer.

    A load belongs to a request's first chunk of context, and a batch with context replays no CUDA graph
    (`ScheduledRequests.can_run_cuda_graph`): its layers run one by one, with their hooks. That leaves
    torch.compile, which may drop hooks or put them into graphs of its own, and models whose layers have none.
    So hooks are certain where the engine's arguments rule out the first, and all passes with loads so far, at
    least one, have run the hook of each layer in order. Nothing is staked on the first such pass.

    Attributes:
        watching: Whether a pass with loads is under way.
    """

    def __init__(self, llm_args: object) -> None:
        self._eager = as_text(dig(llm_args, "backend")) == "pytorch" and (
            getattr(llm_args, "torch_compile_config", _ABSENT) is None
        )
        self._layers = 0
        self._ran: list[int] = []
        self._proven = False
        self.watching = False

    def forget(self) -> None:
        """Start anew, with another pool."""
        self._proven = self.watching = False

    def certain(self, layers: int) -> bool:
        """Say whether the hooks of so many layers, 0 to `layers` - 1, will run in a pass that loads."""
        return self._proven and layers > 0

    def begin(self, layers: int) -> None:
        """Watch the hooks of a pass with loads, which has so many layers."""
        self._layers, self._ran, self.watching = layers, [], True

    def ran(self, layer: int) -> None:
        """Note that the hook of a layer runs."""
        self._ran.append(layer)

    def end(self) -> bool:
        """Say, at the end of the pass, whether it ran the hook of each layer, in order."""
        self.watching = False
        complete = 0 < self._layers == len(self._ran) and self._ran == list(range(self._layers))
        if not complete:
            self._eager = False
        self._proven = complete and self._eager
        return complete
