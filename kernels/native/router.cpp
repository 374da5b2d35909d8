// Which experts a token is sent to, and with what weights: the roundings are those of Megatron's router in its dtype.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "activation.h"
#include "experts.h"
#include "simd.h"
#include "storage.h"

namespace {

float exp_of_nonpositive(float x) {
    float lanes[WIDTH];
    store(lanes, exp2_of_nonpositive(splat(x * LOG2_E)));
    return lanes[0];
}

float sigmoid(float x) {
    const float power = exp_of_nonpositive(-std::fabs(x));
    return (x < 0.0f ? power : 1.0f) / (1.0f + power);
}

// Places of the `count` largest of values [size], the largest first, of equal ones that with the lower place.
// Places that `is_allowed` refuses are passed over. Always `count` of them, whatever is not a number.
template <class IsAllowed>
void largest(const float *values, int64_t size, int64_t count, int32_t *places, const IsAllowed &is_allowed) {
    for (int64_t k = 0; k < count; ++k) {
        int64_t best = -1;
        for (int64_t i = 0; i < size; ++i)
            if ((best < 0 || values[i] > values[best]) && is_allowed(i) && std::find(places, places + k, static_cast<int32_t>(i)) == places + k)
                best = i;
        places[k] = static_cast<int32_t>(best);
    }
}

class Choice {
  public:
    Choice(const Router &router, const float *outputs, float *memory)
        : router_(router), outputs_(outputs), scores_(memory), for_choice_(memory + router.num_experts) {}

    void make(int32_t *chosen, float *weights) {
        const int64_t size = router_.num_experts, count = router_.num_chosen;
        for (int64_t e = 0; e < size; ++e) scores_[e] = router_.is_sigmoid ? in_dtype(sigmoid(outputs_[e])) : outputs_[e];
        if (!router_.is_sigmoid && router_.is_scored_first) softmax(scores_, size);
        for (int64_t e = 0; e < size; ++e)
            for_choice_[e] = router_.choice_bias == nullptr ? scores_[e] : scores_[e] + router_.choice_bias[e];
        choose(chosen);
        for (int64_t k = 0; k < count; ++k) weights[k] = scores_[chosen[k]];
        if (router_.is_sigmoid && count > 1) {
            float sum = 0.0f;
            for (int64_t k = 0; k < count; ++k) sum += weights[k];
            sum = in_dtype(in_dtype(sum) + 1e-20f);
            for (int64_t k = 0; k < count; ++k) weights[k] = in_dtype(weights[k] / sum);
        } else if (!router_.is_sigmoid && !router_.is_scored_first) {
            softmax(weights, count);
        }
        if (router_.weight_scale != 0.0f)
            for (int64_t k = 0; k < count; ++k) weights[k] = in_dtype(weights[k] * router_.weight_scale);
        sort(chosen, weights);
    }

  private:
    float in_dtype(float x) const {
        if (router_.is_wide) return x;
        uint16_t rounded;
        from_float(x, &rounded);
        return to_float(rounded);
    }

    void softmax(float *values, int64_t size) const {
        float highest = values[0], sum = 0.0f;
        for (int64_t i = 1; i < size; ++i) highest = std::max(highest, values[i]);
        for (int64_t i = 0; i < size; ++i) sum += values[i] = exp_of_nonpositive(values[i] - highest);
        for (int64_t i = 0; i < size; ++i) values[i] = in_dtype(values[i] / sum);
    }

    void choose(int32_t *chosen) const {
        const int64_t size = router_.num_experts, count = router_.num_chosen;
        if (router_.num_groups == 0) return largest(for_choice_, size, count, chosen, [](int64_t) { return true; });
        constexpr int64_t MOST_GROUPS = 256;
        float of_groups[MOST_GROUPS];
        int32_t groups[MOST_GROUPS], best[MOST_GROUPS];
        const int64_t group_size = size / router_.num_groups, num_counted = count / router_.num_chosen_groups;
        for (int64_t g = 0; g < router_.num_groups; ++g) {
            largest(for_choice_ + g * group_size, group_size, num_counted, best, [](int64_t) { return true; });
            float sum = 0.0f;
            for (int64_t i = 0; i < num_counted; ++i) sum += for_choice_[g * group_size + best[i]];
            of_groups[g] = router_.choice_bias == nullptr ? in_dtype(sum) : sum;
        }
        largest(of_groups, router_.num_groups, router_.num_chosen_groups, groups, [](int64_t) { return true; });
        int32_t *const end = groups + router_.num_chosen_groups;
        largest(for_choice_, size, count, chosen, [&](int64_t e) {
            return std::find(groups, end, static_cast<int32_t>(e / group_size)) != end;
        });
    }

    // By the experts' numbers: the order in which their outputs are added up.
    void sort(int32_t *chosen, float *weights) const {
        for (int64_t k = 1; k < router_.num_chosen; ++k)
            for (int64_t i = k; i > 0 && chosen[i] < chosen[i - 1]; --i) {
                std::swap(chosen[i], chosen[i - 1]);
                std::swap(weights[i], weights[i - 1]);
            }
    }

    const Router &router_;
    const float *const outputs_;
    float *const scores_, *const for_choice_;
};

}  // namespace

void choose_experts(const Router &router, const float *outputs, float *memory, int32_t *chosen, float *weights) {
    Choice(router, outputs, memory).make(chosen, weights);
}
