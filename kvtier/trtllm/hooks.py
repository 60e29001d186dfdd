"""Whether the engine's hooks in front of the layers can be counted on."""

from __future__ import annotations

from kvtier.trtllm.fields import as_text, dig

_ABSENT = object()


class LayerHooks:
    """Knows whether a pass that runs the hook of the first layer will run those of all others.

    Whether a pass runs hooks at all nobody knows beforehand: a replayed CUDA graph does not, and newer
    releases replay graphs for context, too. A pass that has run its first hook, however, runs its layers one
    by one. What could still leave hooks out is torch.compile, and models of which some layers have none. So
    the engine's arguments must rule out the first, and of all passes with loads so far one at least has run
    every hook in order, and none has run only some.

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
        """Say whether a pass with so many layers that runs the first hook will run all of them, in order."""
        return self._proven and layers > 0

    def begin(self, layers: int) -> None:
        """Watch the hooks of a pass with loads, which has so many layers."""
        self._layers, self._ran, self.watching = layers, [], True

    def ran(self, layer: int) -> None:
        """Note that the hook of a layer runs."""
        self._ran.append(layer)

    def end(self) -> bool:
        """Say, at the end of the pass, whether it ran the hooks of all layers, in order, or none at all."""
        self.watching = False
        if not self._ran:
            return True
        # A pass that also captures a graph runs its hooks more than once.
        complete = self._ran[: self._layers] == list(range(self._layers)) and self._layers > 0
        self._eager &= complete
        self._proven = self._eager
        return complete
