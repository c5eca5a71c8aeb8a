// Routed and shared experts, read in place: out += weight * down(silu(gate x) * up x).
//
// Tokens are grouped by expert. An expert's gate and up rows are one pass over its record, its down
// rows another. Threads divide rows, never a sum, so the result does not depend on their number.
#include <algorithm>

#include "context.h"

namespace deeptalk {
namespace {

constexpr int kPanelRows = 1408;  // most rows of gate or up: the results for 64 tokens stay in the cache

// Lists the tokens of every present expert, ascending by id. If no choice is left after them, it
// also lists all tokens for each record of `own`. Returns the number of choices met, or -1 if an id
// is out of range.
int group_tokens(ExpertRoom& room, const Records& records, int tokens, const Choices& choices,
                 int num_left) {
    const int num_choices = tokens * choices.top_k, num_experts = records.num_experts;
    const auto is_served = [&](int i) { return records.table[choices.ids[i]] && choices.weights[i] != 0.f; };
    room.counts.assign(size_t(num_experts) + 1, 0);
    for (int i = 0; i < num_choices; ++i) {
        const int64_t id = choices.ids[i];
        if (id < 0 || id >= num_experts) return -1;
        if (is_served(i)) ++room.counts[size_t(id) + 1];
    }
    room.units.clear();
    for (int e = 0; e < num_experts; ++e) {
        const int count = room.counts[size_t(e) + 1], first = room.counts[size_t(e)];
        if (count) check_address(records.table[e]);
        if (count) room.units.push_back({reinterpret_cast<const uint8_t*>(records.table[e]), first, count});
        room.counts[size_t(e) + 1] += first;
    }
    const int served = room.counts[size_t(num_experts)];
    const int num_own = served == num_left ? records.num_own : 0;
    const size_t total = size_t(served + num_own * tokens);
    room.tokens.resize(total);
    room.weights.resize(total);
    for (int i = 0; i < num_choices; ++i) {
        if (!is_served(i)) continue;
        const size_t place = size_t(room.counts[size_t(choices.ids[i])]++);
        room.tokens[place] = i / choices.top_k;
        room.weights[place] = choices.weights[i];
    }
    for (int i = 0; i < num_own; ++i) {
        const int first = served + i * tokens;
        room.units.push_back({reinterpret_cast<const uint8_t*>(records.own[i]), first, tokens});
        for (int t = 0; t < tokens; ++t) {
            room.tokens[size_t(first + t)] = t;
            room.weights[size_t(first + t)] = 1.f;
        }
    }
    return served;
}

// Whole tiles, sized so that every thread has four panels.
int panel_rows_of(int ffn_width, int num_units, int threads) {
    const int wanted = (4 * threads + num_units - 1) / std::max(num_units, 1);
    const int tiles = (ffn_width + kFewRows - 1) / kFewRows;
    return std::min((tiles + wanted - 1) / wanted * kFewRows, kPanelRows);
}

class Experts {
  public:
    Experts(dt_context& c, const dt_record& record)
        : c_(c), room_(c.experts), record_(record), kind_(kind_of_group(record.group)) {}

    // hidden = silu(gate x) * up x for a panel of a unit's gate rows and the same up rows. Gate is
    // read before up, because two long streams are faster than alternating tiles.
    void gate_up(const Unit& unit, int begin, int end, const QuantisedRows& x) const {
        alignas(64) float gates[kPanelRows * kTileTokens], up[kTileRows * kTileTokens];
        const int width = record_.ffn_width, tile_rows = tile_rows_of(unit.count);
        for (int first = unit.first; first < unit.first + unit.count; first += kTileTokens) {
            const int count = std::min(kTileTokens, unit.first + unit.count - first);
            const int32_t* tokens = &room_.tokens[size_t(first)];
            float* gate = gates;
            for (int row = begin; row < end; row += tile_rows, gate += kTileRows * count) {
                const int rows = std::min(tile_rows, end - row), next = row + rows;
                tile(unit, gate_up(), record_.width, row, rows, x, tokens, count, gate,
                     next < end ? next : width + begin);
            }
            gate = gates;
            for (int row = begin; row < end; row += tile_rows, gate += kTileRows * count) {
                const int rows = std::min(tile_rows, end - row);
                tile(unit, gate_up(), record_.width, width + row, rows, x, tokens, count, up, width + row + rows);
                for (int t = 0; t < count; ++t) {
                    float* hidden = &room_.hidden[size_t(first + t) * size_t(width)];
                    c_.path.silu_times_up(gate + t * kTileRows, up + t * kTileRows, rows, hidden + row);
                }
            }
        }
    }

    // y += rows [begin, end) of a unit's down times its hidden rows.
    void add_down(const Unit& unit, int begin, int end, const QuantisedRows& hidden, float* y) const {
        alignas(64) float out[kTileTokens * kTileRows];
        const int tile_rows = tile_rows_of(unit.count);
        for (int row = begin; row < end; row += tile_rows) {
            const int rows = std::min(tile_rows, end - row);
            for (int first = unit.first; first < unit.first + unit.count; first += kTileTokens) {
                const int count = std::min(kTileTokens, unit.first + unit.count - first);
                const int32_t* own_rows = &room_.hidden_rows[size_t(first)];
                tile(unit, down(), record_.ffn_width, row, rows, hidden, own_rows, count, out, row + rows);
                for (int t = 0; t < count; ++t) {
                    const float weight = room_.weights[size_t(first + t)];
                    const size_t token = size_t(room_.tokens[size_t(first + t)]);
                    float* place = y + token * size_t(record_.width) + row;
                    for (int r = 0; r < rows; ++r) place[r] += weight * out[t * kTileRows + r];
                }
            }
        }
    }

  private:
    struct Section {
        int64_t weights, scales;
    };
    Section gate_up() const { return {record_.gate_up, record_.gate_up_scales}; }
    Section down() const { return {record_.down, record_.down_scales}; }

    void tile(const Unit& unit, Section section, int columns, int row, int rows,
              const QuantisedRows& x, const int32_t* tokens, int count, float* out,
              int next_row) const {
        const int group = record_.group;
        const size_t row_bytes = size_t(columns) / (group ? 2 : 1);
        const size_t scale_bytes = group ? size_t(columns / group) * 2 : 4;
        const uint8_t* weights = unit.record + section.weights;
        const uint8_t* scales = unit.record + section.scales + size_t(row) * scale_bytes;
        c_.path.tile[kind_]({weights + size_t(row) * row_bytes, scales, columns, rows, x, tokens, count,
                             out, kTileRows, weights + size_t(next_row) * row_bytes});
    }

    dt_context& c_;
    ExpertRoom& room_;
    const dt_record& record_;
    const int kind_;
};

}  // namespace

int num_wanted(int tokens, const Choices& choices) {
    const float* end = choices.weights + tokens * choices.top_k;
    return int(std::count_if(choices.weights, end, [](float weight) { return weight != 0.f; }));
}

int32_t add_experts(dt_context& c, const Records& records, const float* x, int tokens,
                    const Choices& choices, float* y, int* num_left) {
    const dt_record& record = records.form;
    ExpertRoom& room = c.experts;
    const int served = group_tokens(room, records, tokens, choices, *num_left);
    if (served < 0) return DT_OUT_OF_RANGE;
    *num_left -= served;
    const int width = record.width, ffn_width = record.ffn_width, total = int(room.tokens.size());
    const int num_units = int(room.units.size());
    const QuantisedRows rows = room.x.reserve(c.path, tokens, width);
    if (!quantise_rows(c, x, tokens, width, size_t(width), record.group, rows)) return DT_NOT_FINITE;
    room.hidden.resize(size_t(total) * size_t(ffn_width));
    const Experts experts(c, record);
    const int panel_rows = panel_rows_of(ffn_width, num_units, c.pool.threads());
    const int panels = (ffn_width + panel_rows - 1) / panel_rows;
    c.pool.run(num_units * panels, [&](int i) {
        const int begin = i % panels * panel_rows;
        experts.gate_up(room.units[size_t(i / panels)], begin, std::min(begin + panel_rows, ffn_width), rows);
    });
    const QuantisedRows hidden = room.quantised_hidden.reserve(c.path, total, ffn_width);
    room.hidden_rows.resize(size_t(total));
    for (int i = 0; i < total; ++i) room.hidden_rows[size_t(i)] = i;
    if (!quantise_rows(c, room.hidden.data(), total, ffn_width, size_t(ffn_width), record.group,
                       hidden)) {
        return DT_NOT_FINITE;
    }
    c.pool.run_ranges((width + kFewRows - 1) / kFewRows, [&](int begin, int end) {
        for (const Unit& unit : room.units) {
            experts.add_down(unit, begin * kFewRows, std::min(end * kFewRows, width), hidden, y);
        }
    });
    return DT_OK;
}

}  // namespace deeptalk
