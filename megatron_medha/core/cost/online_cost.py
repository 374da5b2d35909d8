"""A cost model that starts from the roofline and learns from every step, so that no profiling run is needed."""

from __future__ import annotations

from megatron_medha.core.cost.fitted_cost import FittedCost
from megatron_medha.core.cost.step_cost import CostModel, RooflineCost, StepLoad

_NUM_FEATURES = 8
_NOISE = 0.04                # of a step's duration, what a quiet machine shows between equal steps
_PRIOR_SPREAD = 30.0         # times its start value that a coefficient may be off; start values are only a tie-break
_RETENTION = 0.999           # of what was learnt, from step to step: about the last 1,000 steps count
_RETENTION_AFTER_OUTLIERS = 0.25  # the same once the fit itself is taken to be wrong: the machine has changed
_OUTLIER_FACTOR = 4.0        # times the usual error that makes a step an outlier (a page fault, a neighbour), ...
_MIN_OUTLIER_ERROR = 0.05    # ... but never below this relative error
_MAX_OUTLIERS = 2.5          # in short order after which it is the fit that is wrong, not the steps
_STEADY_FACTOR = 0.25        # how much of an outlier a step that fits makes up for
_ERROR_MEMORY = 0.02         # weight of the newest step in the usual error
_DAMPING = 1e-3              # of the prior's weight; keeps a coefficient of which nothing is left to be learnt in place
_PACE_GAIN = 0.5             # weight of the newest step that has a chunk in the pace of the machine
_PACE_MEMORY = 0.02          # weight of the newest step in the judgement whether following the pace helps
_MAX_PACE = 2.0              # a single step counts as at most this much slower or faster than usual
_REVISION_CHANGE = 0.05      # relative change of a reference prediction that calls for new tables
_REVISION_STEPS = 16         # steps between two looks at the reference predictions
_MIN_STEP_S = 1e-7           # a step takes some time, whatever the fit says


class OnlineCost(CostModel):
    """A linear model of step time with coefficients >= 0: least squares on relative errors, old steps fading.

    Predicted seconds = theta . features, with the features 1, tokens, tokens past each hinge, sequences,
    query-key pairs of chunks, keys read by chunks, keys read by decodes. Coefficients that cannot be negative make
    predictions rise with the work, which the chunk search relies on. Steps are weighted by 1 / duration: a budget is
    kept or missed in percent, and a step held up by something else then moves the fit very little.

    On top of the fit comes the machine's pace of the last few steps: cores shared with others run 20% slower for
    tenths of a second and then fast again, too short for the fit and too long to be noise (autocorrelation of the
    fit's errors 0.8 from step to step, on a rented 2-core machine). Where following it has not helped of late,
    because errors are independent from step to step, it stays at 1.

    It names its protocol because compiled code then calls it directly, with numbers that are not boxed.

    Tried and worse: a Kalman filter on the same features. Coefficients cut off at 0 after its update left it sure
    of a wrong fit when the roofline was ten times too slow.
    """

    def __init__(self, prior: RooflineCost) -> None:
        shape, hardware, tp = prior.shape, prior.hardware, prior.layout.tp
        memory_bytes_per_s = hardware.memory_bytes_per_s * hardware.memory_efficiency
        matmul_flops_per_s = hardware.flops_per_s * hardware.linear_efficiency
        attention_flops_per_s = hardware.flops_per_s * hardware.attention_efficiency
        weights = shape.num_layers * shape.num_layer_params / tp
        per_token = 2 * shape.num_layers * shape.num_active_layer_params / tp / matmul_flops_per_s
        weight_read_s = weights * shape.bytes_per_element / memory_bytes_per_s
        per_key = shape.kv_bytes_per_token / min(tp, shape.num_cached_heads) / memory_bytes_per_s
        # Matrix products wait for weights up to here and for FLOPs from here on; machines differ in where it is.
        knee_tokens = max(4.0, weight_read_s / per_token)
        self._hinges_tokens = (0.25 * knee_tokens, knee_tokens)
        self.theta = [
            hardware.step_overhead_s + shape.num_layers * hardware.layer_overhead_s + weight_read_s,
            0.3 * per_token,  # the three slopes add up to the roofline's
            0.4 * per_token,
            0.3 * per_token,
            hardware.chunk_overhead_s + 2 * shape.num_head_params / tp / matmul_flops_per_s,
            4 * shape.cached_dim * shape.num_heads * shape.num_layers / tp / attention_flops_per_s,
            per_key,
            per_key,
        ]
        start = [self.theta[0], per_token, per_token, per_token, *self.theta[4:]]
        weight = [(_NOISE / (_PRIOR_SPREAD * max(value, 1e-30))) ** 2 for value in start]
        # The normal equations, gram . theta = moments, summed over all steps; the prior counts as a faint step.
        self._gram = [
            [weight[i] if i == j else 0.0 for j in range(_NUM_FEATURES)] for i in range(_NUM_FEATURES)
        ]
        self._moments = [w * value for w, value in zip(weight, self.theta, strict=True)]
        self._prior_weight = weight
        self._damping = [_DAMPING * w for w in weight]
        self._usual_error = 0.5
        self._pace = 1.0           # actual over fitted, of the last few steps
        self._pace_benefit = 0.0    # how much smaller, relative errors, predictions are with it than without, of late
        self._paced = list(self.theta)  # the coefficients times the pace
        self._outliers = 0.0
        self._reference_s = self._reference()
        self.num_observed = 0
        self._revision = 0

    def start_from(self, profile: FittedCost) -> None:
        """Go on from a profile, as if its steps had just been observed. Call it before anything is observed."""
        assert not self.num_observed, "a profile is where learning starts"
        self._hinges_tokens = profile.hinges_tokens
        self.theta = list(profile.theta)
        self._gram = [
            [value + (weight if i == j else 0.0) for j, value in enumerate(row)]
            for i, (row, weight) in enumerate(zip(profile.gram, self._prior_weight, strict=True))
        ]
        self._moments = [
            value + weight * start
            for value, weight, start in zip(profile.moments, self._prior_weight, self.theta, strict=True)
        ]
        self._usual_error = max(profile.error_p50, _NOISE)
        self._paced = list(self.theta)
        self._reference_s = self._reference()
        self._revision += 1

    @property
    def revision(self) -> int:
        """See CostModel."""
        return self._revision

    @property
    def pace(self) -> float:
        """How much slower the machine is at the moment than its fit says, as far as that has been worth knowing."""
        return self._pace if self._pace_benefit > 0.0 else 1.0

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        """See CostModel."""
        paced = self._paced
        total_s = paced[0] + paced[1] * num_tokens + paced[4] * num_sequences
        low, high = self._hinges_tokens
        if num_tokens > low:
            total_s += paced[2] * (num_tokens - low)
            if num_tokens > high:
                total_s += paced[3] * (num_tokens - high)
        return total_s

    def attention_s(self, start: int, num_tokens: int) -> float:
        """See CostModel."""
        paced = self._paced
        return paced[5] * num_tokens * (start + 0.5 * (num_tokens + 1)) + paced[6] * (start + num_tokens)

    def decode_attention_s(self, context: int) -> float:
        """See CostModel."""
        return self._paced[7] * context

    def observe(self, load: StepLoad, duration_s: float) -> None:
        """See CostModel."""
        if duration_s <= 0.0:
            return
        low, high = self._hinges_tokens
        per_s = 1.0 / duration_s
        num_tokens = load.num_tokens
        f0 = per_s
        f1 = num_tokens * per_s
        f2 = (num_tokens - low) * per_s if num_tokens > low else 0.0
        f3 = (num_tokens - high) * per_s if num_tokens > high else 0.0
        f4 = load.num_sequences * per_s
        f5 = load.chunk_pairs * per_s
        f6 = load.chunk_context * per_s
        f7 = load.decode_context * per_s
        theta = self.theta
        t0, t1, t2, t3, t4, t5, t6, t7 = theta
        fitted = t0 * f0 + t1 * f1 + t2 * f2 + t3 * f3 + t4 * f4 + t5 * f5 + t6 * f6 + t7 * f7  # over actual
        kept = self._retention(abs(1.0 - fitted))
        if load.chunk_context:
            self._update_pace(fitted)
        # The newest step is added to the equations row by row, and each row at once moves its coefficient towards the
        # least squares with every coefficient >= 0: one sweep of coordinate descent, and the next step goes on where
        # this one stopped. Written out: as loops over lists it is three times the instructions, compiled.
        gram, moments, damping = self._gram, self._moments, self._damping
        for i, feature in enumerate((f0, f1, f2, f3, f4, f5, f6, f7)):
            g0, g1, g2, g3, g4, g5, g6, g7 = gram[i]
            g0, g1 = kept * g0 + feature * f0, kept * g1 + feature * f1
            g2, g3 = kept * g2 + feature * f2, kept * g3 + feature * f3
            g4, g5 = kept * g4 + feature * f4, kept * g5 + feature * f5
            g6, g7 = kept * g6 + feature * f6, kept * g7 + feature * f7
            gram[i] = row = [g0, g1, g2, g3, g4, g5, g6, g7]
            moments[i] = moment = kept * moments[i] + feature
            t0, t1, t2, t3, t4, t5, t6, t7 = theta
            gradient = moment - (
                g0 * t0 + g1 * t1 + g2 * t2 + g3 * t3 + g4 * t4 + g5 * t5 + g6 * t6 + g7 * t7
            )
            value = theta[i] + gradient / (row[i] + damping[i])
            theta[i] = value if value > 0.0 else 0.0
        theta[0] = max(theta[0], _MIN_STEP_S)
        pace = self.pace
        self._paced = [pace * value for value in self.theta] if pace != 1.0 else self.theta.copy()
        self.num_observed += 1
        if self.num_observed % _REVISION_STEPS == 0:
            self._revise()

    def _update_pace(self, fitted: float) -> None:
        """Take a step's time into the pace, and how well the pace so far would have foretold it."""
        gained = abs(1.0 - fitted) - abs(1.0 - fitted * self._pace)
        self._pace_benefit += _PACE_MEMORY * (gained - self._pace_benefit)
        ratio = min(max(1.0 / max(fitted, 1e-9), 1.0 / _MAX_PACE), _MAX_PACE)
        self._pace += _PACE_GAIN * (ratio - self._pace)

    def _retention(self, error: float) -> float:
        """How much of what was learnt still counts after a step that the fit missed by this relative error."""
        is_outlier = error > _OUTLIER_FACTOR * self._usual_error + _MIN_OUTLIER_ERROR
        self._usual_error += _ERROR_MEMORY * (min(error, _OUTLIER_FACTOR * self._usual_error) - self._usual_error)
        if not is_outlier:
            self._outliers = max(0.0, self._outliers - _STEADY_FACTOR)
            return _RETENTION
        self._outliers += 1.0
        if self._outliers <= _MAX_OUTLIERS:
            return _RETENTION
        self._outliers -= 1.0
        return _RETENTION_AFTER_OUTLIERS

    def _revise(self) -> None:
        reference_s = self._reference()
        if any(
            abs(new - old) > _REVISION_CHANGE * old for new, old in zip(reference_s, self._reference_s, strict=True)
        ):
            self._reference_s = reference_s
            self._revision += 1

    def _reference(self) -> tuple[float, float, float]:
        """What the fit says of three steps, at its usual pace: a passing pace is no reason for new tables.

        Whole steps: attention alone is a guess while only short contexts are seen, and guesses come and go.
        """
        return (
            self.linear_s(16, 1) / self.pace,
            (self.linear_s(512, 1) + self.attention_s(0, 512)) / self.pace,
            (self.linear_s(64, 1) + self.attention_s(32768, 64)) / self.pace,
        )
