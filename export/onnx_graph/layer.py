"""One Mamba block as ONNX nodes: norm, projection, causal convolution, selective scan, gate, projection.

Symbols are those of `yunmin.scan`. States are kept as (B, K-1, D) and (B, N, D): the long axis last, where vectors run
along it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from export.onnx_graph.builder import MICROSOFT, GraphBuilder
from export.onnx_graph.matrices import Matrices
from export.onnx_graph.weights import GraphWeights
from yunmin.axes import layer_prefix
from yunmin.config import MambaConfig
from yunmin.runtime.onnx_contract import Flavour, StateTensor


@dataclass(frozen=True)
class LayerWriter:
    """Adds blocks to a graph.

    Attributes:
        graph: to add to.
        config: of the model.
        weights: of the model.
        matrices: its products.
        flavour: of the graph.
        is_step: a value, whether each sequence has one token.
    """

    graph: GraphBuilder
    config: MambaConfig
    weights: GraphWeights
    matrices: Matrices
    flavour: Flavour
    is_step: str

    def norm(self, x: str, name: str) -> str:
        """Root-mean-square normalization (B, T, d), times a weight (d,)."""
        graph, two = self.graph, self.graph.constant(2.0, "float32")
        mean = graph.op("ReduceMean", [graph.op("Pow", [x, two]), graph.ints(-1)], keepdims=1)
        root = graph.op("Sqrt", [graph.op("Add", [mean, graph.constant(self.config.norm_eps, "float32")])])
        # in just this form, onnxruntime makes one operator of it when it loads the graph
        return graph.op("Mul", [graph.op("Div", [x, root]), self._vector(name)])

    def block(self, residual: str, layer: int, conv: StateTensor, recurrent: StateTensor) -> str:
        """Adds layer `layer` between a residual stream and the next (B, T, d).

        Args:
            residual: before the block.
            layer: its number.
            conv: state of its convolution (B, K-1, D).
            recurrent: state of its scan (B, N, D).
        """
        graph, prefix = self.graph, f"{layer_prefix(layer)}mixer."
        inner, n = self.config.d_inner[layer], self.config.d_state[layer]
        hidden = self.norm(residual, f"{layer_prefix(layer)}norm.weight")
        xz = self._with_bias(self.matrices.linear(hidden, f"{prefix}in_proj.weight"), f"{prefix}in_proj.bias")
        x, z = graph.ops("Split", [xz, graph.ints(inner, inner)], 2, axis=-1)  # (B, T, D) each
        u = self._convolution(x, prefix, conv)
        maps = self.matrices.linear(u, f"{prefix}x_proj.weight")
        dt, B_ssm, C_ssm = graph.ops("Split", [maps, graph.ints(self.config.dt_rank, n, n)], 3, axis=-1)
        raw = graph.op(
            "Add", [self.matrices.linear(dt, f"{prefix}dt_proj.weight"), self._vector(f"{prefix}dt_proj.bias")]
        )
        delta = self._softplus(raw)
        y = self._scan(delta, u, B_ssm, C_ssm, prefix, layer, recurrent)
        y = graph.op("Add", [y, graph.op("Mul", [u, self._vector(f"{prefix}D")])])
        gated = graph.op("Mul", [y, self._silu(z)])
        out = self.matrices.linear(gated, f"{prefix}out_proj.weight", keeps_nan=True)  # a broken state must stay seen
        return graph.op("Add", [residual, self._with_bias(out, f"{prefix}out_proj.bias")])

    def _vector(self, name: str) -> str:
        return self.graph.weight(name, self.weights.plain(name))

    def _with_bias(self, x: str, name: str) -> str:
        return self.graph.op("Add", [x, self._vector(name)]) if self.config.use_bias else x

    def _silu(self, x: str) -> str:
        if self.flavour == "ort":
            return self.graph.op("QuickGelu", [x], domain=MICROSOFT, alpha=1.0)  # x * sigmoid(x)
        return self.graph.op("Mul", [x, self.graph.op("Sigmoid", [x])])

    def _softplus(self, x: str) -> str:
        """Computes log(1 + exp(x)), small results to full relative precision.

        ONNX Runtime's own Softplus, as exact, runs in one thread and takes six times as long. With u = exp(x) and
        w = 1 + u rounded, (w - 1) - u is what the rounding added, and log(w) - ((w - 1) - u) / w is log(1 + u) nearly
        to the last bit.
        """
        graph, one = self.graph, self.graph.constant(1.0, "float32")
        u = graph.op("Exp", [graph.op("Min", [x, graph.constant(80.0, "float32")])])  # finite; beyond, the result is x
        w = graph.op("Add", [u, one])
        added = graph.op("Sub", [graph.op("Sub", [w, one]), u])
        log = graph.op("Sub", [graph.op("Log", [w]), graph.op("Div", [added, w])])
        return graph.op("Max", [x, log])

    def _convolution(self, x: str, prefix: str, state: StateTensor) -> str:
        """SiLU of the causal convolution: (B, T, D) -> (B, T, D).

        As K products of shifted inputs: in ONNX Runtime faster than its Conv, and than its CausalConvWithState, which
        runs in one thread.
        """
        graph, taps = self.graph, self.config.d_conv
        weight = self.weights.plain(f"{prefix}conv1d.weight")[:, 0]  # (D, K)
        padded = graph.op("Concat", [state.past, x], axis=1)  # (B, K-1+T, D)
        axis = graph.ints(1)
        graph.op("Slice", [padded, graph.ints(1 - taps), graph.ints(2**62), axis], output=state.present)
        total = ""
        for tap in range(taps):
            end = tap + 1 - taps  # from the end
            shifted = graph.op("Slice", [padded, graph.ints(tap), graph.ints(end), axis]) if end else x
            product = graph.op("Mul", [shifted, graph.weight(f"{prefix}conv1d.tap.{tap}", weight[:, tap])])
            total = graph.op("Add", [total, product]) if total else product
        if self.config.use_conv_bias:
            total = graph.op("Add", [total, self._vector(f"{prefix}conv1d.bias")])
        return self._silu(total)

    def _scan(self, delta: str, u: str, B_ssm: str, C_ssm: str, prefix: str, layer: int, state: StateTensor) -> str:
        """The recurrence (B, T, D), without the skip: `Scan`, or for a single token what it would do, which is faster.

        The step's large values are made for the first token in any case, outside of the branch for single ones:
        ONNX Runtime gives values inside a branch new memory with each run.
        """
        graph = self.graph
        inner, n = self.config.d_inner[layer], self.config.d_state[layer]
        A = -torch.exp(self.weights.plain(f"{prefix}A_log"))  # (D, N)
        decay_rates = graph.weight(f"{prefix}A.T", A.T)
        delta_u = graph.op("Mul", [delta, u])
        zero, one = graph.ints(0), graph.ints(1)
        first_delta, first_delta_u, first_B = (graph.op("Slice", [x, zero, one, one]) for x in (delta, delta_u, B_ssm))
        decay = graph.op("Exp", [graph.op("Mul", [first_delta, decay_rates])])  # (B, N, D)
        decayed = graph.op("Mul", [decay, state.past])
        column = graph.op("Reshape", [first_B, graph.ints(-1, n, 1)])
        added = graph.op("Mul", [column, first_delta_u])
        step = [
            helper.make_node("Add", [decayed, added], ["h_next"]),
            helper.make_node("MatMul", [C_ssm, "h_next"], ["y_row"]),
        ]
        scan = helper.make_node(
            "Scan",
            [state.past, delta, delta_u, B_ssm, C_ssm],
            ["h_last", "y_rows"],
            body=self._step_body(decay_rates, layer),
            num_scan_inputs=4,
            scan_input_axes=[1, 1, 1, 1],
            scan_output_axes=[1],
        )

        def branch(nodes: list[NodeProto], h: str, y: str) -> GraphProto:
            outputs = [_value(h, n, inner), _value(y, "sequence", inner)]
            return helper.make_graph(nodes, f"layers.{layer}.{y}", [], outputs)

        _, y = graph.ops(
            "If",
            [self.is_step],
            2,
            outputs=[state.present, f"{prefix}y"],
            then_branch=branch(step, "h_next", "y_row"),
            else_branch=branch([scan], "h_last", "y_rows"),
        )
        return y

    def _step_body(self, decay_rates: str, layer: int) -> GraphProto:
        """One token: h = exp(delta A) h + B (delta u), y = C h, with h (B, N, D)."""
        inner, n = self.config.d_inner[layer], self.config.d_state[layer]
        one, last = self.graph.ints(1), self.graph.ints(-1)
        nodes = [
            ("Unsqueeze", ["delta", one], "delta_row"),  # (B, 1, D)
            ("Mul", ["delta_row", decay_rates], "delta_A"),  # (B, N, D)
            ("Exp", ["delta_A"], "decay"),
            ("Mul", ["decay", "h"], "decayed"),
            ("Unsqueeze", ["B_ssm", last], "B_column"),  # (B, N, 1)
            ("Unsqueeze", ["delta_u", one], "delta_u_row"),  # (B, 1, D)
            ("MatMul", ["B_column", "delta_u_row"], "input"),
            ("Add", ["decayed", "input"], "h_next"),
            ("Unsqueeze", ["C_ssm", one], "C_row"),  # (B, 1, N)
            ("MatMul", ["C_row", "h_next"], "y_row"),
            ("Squeeze", ["y_row", one], "y"),
        ]
        inputs = [_value("h", n, inner), _value("delta", inner), _value("delta_u", inner)]
        return helper.make_graph(
            [helper.make_node(kind, names, [output], name=output) for kind, names, output in nodes],
            f"layers.{layer}.step",
            [*inputs, _value("B_ssm", n), _value("C_ssm", n)],
            [_value("h_next", n, inner), _value("y", inner)],
        )


def _value(name: str, *shape: str | int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
