"""`RoutedExperts` for ONNX: schema and body.

The body is a Loop over the experts that some row chose: it reads only their weights, and copies one expert's at a
time. Results are added in float32.
"""

from gsx_plugins.domain import OnnxOp

ROUTED_EXPERTS = OnnxOp(
    name="RoutedExperts",
    inputs=[("rows", "T"), ("logits", "float"), ("gate", "T"), ("up", "T"), ("down", "T")],
    outputs=[("out", "T")],
    attributes=("top_k", "normalized"),
    body="""
        probabilities = Softmax <axis = -1> (logits)
        k = Constant <value_int: int = @top_k> ()
        first = Constant <value_ints = [0]> ()
        second = Constant <value_ints = [1]> ()
        flat = Constant <value_ints = [-1]> ()
        k_1d = Unsqueeze (k, first)
        best, experts = TopK <axis = -1> (probabilities, k_1d)
        together = ReduceSum <keepdims = 1> (best, second)
        of_one = Div (best, together)
        is_normalized = Constant <value_int: int = @normalized> ()
        is_normalized_bool = Cast <to = 9> (is_normalized)
        shares = Where (is_normalized_bool, of_one, best)
        size = Shape <start = 1> (logits)
        count = Squeeze (size, first)
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        numbers = Range (zero, count, one)
        column = Unsqueeze (numbers, second)
        choices = Reshape (experts, flat)
        is_chosen = Equal (column, choices)
        is_chosen_int = Cast <to = 7> (is_chosen)
        uses = ReduceSum <keepdims = 0> (is_chosen_int, second)
        used = NonZero (uses)
        used_1d = Reshape (used, flat)
        used_count = Size (used_1d)
        shape = Shape (rows)
        zeros = ConstantOfShape (shape)
        nothing = Constant <value_float = 0.0> ()
        always = Cast <to = 9> (one)
        total = Loop <body = of_expert (int64 turn, bool go, float[K, H] so_far) => (bool goes, float[K, H] sum) {
            goes = Identity (go)
            expert = Gather <axis = 0> (used_1d, turn)
            is_own = Equal (experts, expert)
            own_shares = Where (is_own, shares, nothing)
            row_shares = ReduceSum <keepdims = 1> (own_shares, second)
            own_int = Cast <to = 7> (is_own)
            own_count = ReduceSum <keepdims = 0> (own_int, second)
            own = NonZero (own_count)
            index = Reshape (own, flat)
            x = Gather <axis = 0> (rows, index)
            gate_weight = Gather <axis = 0> (gate, expert)
            up_weight = Gather <axis = 0> (up, expert)
            down_weight = Gather <axis = 0> (down, expert)
            gated = MatMul (x, gate_weight)
            slope = Sigmoid (gated)
            activated = Mul (gated, slope)
            raised = MatMul (x, up_weight)
            inner = Mul (activated, raised)
            result = MatMul (inner, down_weight)
            result_float = Cast <to = 1> (result)
            share = Gather <axis = 0> (row_shares, index)
            weighted = Mul (result_float, share)
            place = Unsqueeze (index, second)
            sum = ScatterND <reduction = "add"> (so_far, place, weighted)
        }> (used_count, always, zeros)
        out = CastLike (total, rows)
    """,
    doc="rows through the experts with the largest router probabilities, weighted by these",
)
