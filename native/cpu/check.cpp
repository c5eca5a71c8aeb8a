// Compares the kernels with references in double, without Python: for sanitizers and qemu-user.
//
//     python native/cpu/build.py build/native_check --check [--compiler ...] [--flag ...]
//
// It calls only the C interface, so it also links with a library that is already built. ROUNDS sets
// how long it runs; `hostile ROUNDS [PATH]` checks only hostile arguments.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "check.h"

void expect(bool holds, const char* claim, const char* path, double found) {
    if (holds) return;
    std::fprintf(stderr, "%s: not so on %s (%g)\n", claim, path, found);
    std::exit(1);
}

namespace {

std::mt19937 engine(7);

float normal() { return std::normal_distribution<float>()(engine); }
int below(int n) { return int(engine() % unsigned(n)); }

std::vector<float> normals(size_t n) {
    std::vector<float> values(n);
    for (float& value : values) value = normal();
    return values;
}

std::vector<double> rounded(const float* x, int n) {
    std::vector<double> out(static_cast<size_t>(n));
    for (int begin = 0; begin < n; begin += 128) {
        const int end = begin + 128 < n ? begin + 128 : n;
        float largest = 0.f;
        for (int i = begin; i < end; ++i) largest = std::fmax(largest, std::fabs(x[i]));
        if (largest < 1e-30f) continue;
        const float inverse = 127.f / largest;
        for (int i = begin; i < end; ++i) {
            out[size_t(i)] = double(std::nearbyintf(x[i] * inverse)) * double(largest / 127.f);
        }
    }
    return out;
}

// A random matrix in the kernels' layout, and its values.
struct Stored {
    std::vector<uint8_t> weights;
    std::vector<uint16_t> halves;
    std::vector<float> floats;
    std::vector<double> values;
    dt_matrix native;

    Stored(int rows, int columns, int group) : values(size_t(rows) * size_t(columns)) {
        const size_t total = values.size();
        weights.resize(group ? total / 2 : total);
        for (uint8_t& byte : weights) byte = uint8_t(engine());
        if (group) halves.resize(total / size_t(group));
        if (!group) floats = normals(size_t(rows));
        for (uint16_t& half : halves) half = uint16_t(0x2000 + below(0x400));  // 2^-7 to 2^-6
        for (size_t i = 0; i < total; ++i) {
            if (group) {
                const uint8_t both = weights[i / 2];
                const int step = i % 2 ? int8_t(both) >> 4 : (both & 15) - 8;
                const int fraction = halves[i / size_t(group)] & 0x3ff;
                values[i] = step * std::ldexp(1024.0 + fraction, -17);
            } else {
                values[i] = double(int8_t(weights[i])) * double(floats[i / size_t(columns)]);
            }
        }
        native = {span(weights), group ? span(halves) : span(floats), rows, columns, group};
    }
};

void check_linear(dt_context* c, const char* path, int group) {
    const int heads = 1 + below(3), rows = 1 + below(150), tokens = 1 + below(9);
    const int columns = (1 + below(9)) * (group ? group : 13) + below(2) * 1024;
    const Stored matrix(heads * rows, columns, group);
    const std::vector<float> x = normals(size_t(tokens * heads * columns));
    std::vector<float> y(size_t(tokens * heads * rows));
    const int32_t status = dt_linear(c, &matrix.native, heads, span(x), tokens, room(y));
    expect(status == DT_OK, "a linear layer runs", path, status);
    for (int i = 0; i < tokens * heads; ++i) {
        const std::vector<double> row = rounded(&x[size_t(i) * size_t(columns)], columns);
        for (int r = 0; r < rows; ++r) {
            const double* w = &matrix.values[size_t(i % heads * rows + r) * size_t(columns)];
            double sum = 0, magnitude = 1e-30;
            for (int k = 0; k < columns; ++k) {
                sum += w[k] * row[size_t(k)];
                magnitude += std::fabs(w[k] * row[size_t(k)]);
            }
            const double error = std::fabs(double(y[size_t(i * rows + r)]) - sum) / magnitude;
            expect(error < 2e-6, "a linear layer is its matrix", path, error);
        }
    }
}

// Runs the same experts on all tokens at once and token by token: the sums must be equal to the
// bit, and no byte outside a record may be read. The Python tests check the values.
void check_experts(dt_context* c, const char* path, int group) {
    const int step = group ? group : 16, width = step * (1 + below(4)), ffn_width = step * (1 + below(4));
    const int tokens = 1 + below(20), num_experts = 5, own = 2;
    std::vector<Stored> gate_ups, downs;
    std::vector<std::vector<uint8_t>> records;
    dt_record form{width, ffn_width, group, 0, 0, 0, 0};
    for (int e = 0; e < num_experts + own; ++e) {
        gate_ups.emplace_back(2 * ffn_width, width, group);
        downs.emplace_back(width, ffn_width, group);
        std::vector<uint8_t> record;
        const auto append = [&](const auto& array) {
            record.resize((record.size() + 15) / 16 * 16);
            const size_t offset = record.size();
            const uint8_t* bytes = reinterpret_cast<const uint8_t*>(array.data());
            record.insert(record.end(), bytes, bytes + array.size() * sizeof(array[0]));
            return int64_t(offset);
        };
        const Stored &gate_up = gate_ups.back(), &down = downs.back();
        form.gate_up = append(gate_up.weights);
        form.down = append(down.weights);
        form.gate_up_scales = group ? append(gate_up.halves) : append(gate_up.floats);
        form.down_scales = group ? append(down.halves) : append(down.floats);
        record.shrink_to_fit();
        records.push_back(record);
    }
    std::vector<uint64_t> table;
    for (const auto& record : records) table.push_back(reinterpret_cast<uint64_t>(record.data()));
    const std::vector<float> x = normals(size_t(tokens * width)), weights = normals(size_t(tokens * 2));
    std::vector<int64_t> ids;
    for (int t = 0; t < tokens; ++t) {
        const int first = below(num_experts);
        ids.insert(ids.end(), {first, (first + 1 + below(num_experts - 1)) % num_experts});
    }
    std::vector<float> together(x.size()), alone(x.size());
    const dt_table where{span(table), int64_t(records[0].size())};
    int32_t status = dt_moe(c, &form, &where, own, span(x), tokens, span(ids), span(weights), 2, room(together));
    for (int t = 0; t < tokens && status == DT_OK; ++t) {
        const size_t at = size_t(t) * size_t(width), row_bytes = size_t(width) * sizeof(float);
        status = dt_moe(c, &form, &where, own, span(&x[at], row_bytes), 1, span(&ids[size_t(2 * t)], 16),
                        span(&weights[size_t(2 * t)], 8), 2, {&alone[at], int64_t(row_bytes)});
    }
    expect(status == DT_OK, "experts run", path, status);
    expect(together == alone, "grouping tokens changes no bit of the experts", path, 0);
    table[size_t(ids[0])] = 0;
    status = dt_moe(c, &form, &where, own, span(x), tokens, span(ids), span(weights), 2, room(together));
    expect(status == DT_EXPERT_ABSENT, "an absent expert is refused", path, status);
}

// Paths that mix two rows at once round a row's share: to 8 bits for bfloat16 rows, to 15 bits for
// int8 rows.
double attention_tolerance(const std::string& path, int kind) {
    if (kind == 0) return path == "avx512-bf16" ? 4e-3 : 2e-5;
    return path.rfind("avx512", 0) == 0 ? 2e-4 : 2e-5;
}

void check_attention(dt_context* c, const char* path, int kind) {
    const int heads = 1 + below(20), latent = 1 + below(70), rope = 2 * (1 + below(20));
    const int rows = 1 + below(4), position = below(700), width = latent + rope;
    const int end = position + rows;
    const size_t row_bytes = size_t(dt_cache_row_bytes(c, latent, rope, kind));
    std::vector<uint8_t> cache(size_t(end) * row_bytes);
    std::vector<float> values(size_t(end * width));
    for (int i = 0; i < end; ++i) {
        float* row = &values[size_t(i) * size_t(width)];
        // Small integers times 2^n, with the largest one always present: both cache types hold them
        // and their queries exactly.
        for (int k = 0; k < width; ++k) row[k] = float(below(255) - 127) / 64.f;
        row[0] = row[latent] = 127.f / 64.f;
        const int32_t status =
            dt_cache_write(c, latent, rope, kind, span(row, size_t(width) * sizeof(float)),
                           {&cache[size_t(i) * row_bytes], int64_t(row_bytes)});
        expect(status == DT_OK, "a row is written", path, status);
    }
    std::vector<float> queries(size_t(rows * heads * width)), mixed(size_t(rows * heads * latent));
    for (float& query : queries) query = float(below(255) - 127) / 512.f;
    for (int i = 0; i < rows * heads; ++i) {
        queries[size_t(i * width)] = queries[size_t(i * width + latent)] = 127.f / 512.f;
    }
    const dt_pass pass{{}, {room(cache), {}}, 1, rows, position, 0};
    const int32_t status = dt_attend(c, heads, latent, rope, kind, &pass, span(queries), room(mixed));
    expect(status == DT_OK, "attention runs", path, status);
    for (int i = 0; i < rows * heads; ++i) {
        const int seen = position + i / heads + 1;
        std::vector<double> shares(static_cast<size_t>(seen));
        double largest = -1e30, total = 0;
        for (int r = 0; r < seen; ++r) {
            for (int k = 0; k < width; ++k) {
                shares[size_t(r)] += double(queries[size_t(i * width + k)]) * double(values[size_t(r * width + k)]);
            }
            largest = std::fmax(largest, shares[size_t(r)]);
        }
        for (double& share : shares) total += share = std::exp(share - largest);
        for (int k = 0; k < latent; ++k) {
            double sum = 0;
            for (int r = 0; r < seen; ++r) sum += shares[size_t(r)] * double(values[size_t(r * width + k)]);
            const double error = std::fabs(sum / total - double(mixed[size_t(i * latent + k)]));
            expect(error < attention_tolerance(path, kind), "attention is softmax over the cache", path, error);
        }
    }
}

void check_snake(dt_context* c, const char* path) {
    const int channels = 1 + below(5), samples = 1 + below(100);
    std::vector<float> x = normals(size_t(channels * samples)), y(x.size());
    std::vector<float> alpha(static_cast<size_t>(channels));
    for (float& a : alpha) a = 0.1f + float(below(100)) / 25.f;
    const int32_t status = dt_snake(c, span(x), span(alpha), channels, samples, room(y));
    expect(status == DT_OK, "snake runs", path, status);
    for (size_t i = 0; i < x.size(); ++i) {
        const double a = double(alpha[i / size_t(samples)]), sine = std::sin(a * double(x[i]));
        const double error = std::fabs(double(y[i]) - (double(x[i]) + sine * sine / a));
        expect(error < 5e-6, "snake is its formula", path, error);
    }
}

// Pushes frames in pieces of these sizes; each call has its own arrays.
std::vector<float> codec_sound(dt_codec* codec, const dt_codec_spec& spec, const std::vector<int>& pieces) {
    const int rates[] = {2 * spec.rates[0], 2 * spec.rates[0] * spec.rates[1]};
    std::vector<float> state(size_t(dt_codec_state_size(codec))), sound;
    int64_t position = 0;
    for (int frames : pieces) {
        std::vector<int64_t> codes;
        std::vector<float> noise[2], next_state(state.size()), pcm(size_t(frames * rates[1]));
        for (int i = 0; i < 3 * frames; ++i) codes.push_back((position * 3 + i) % spec.codebook_size);
        for (int block = 0; block < 2; ++block) {
            const int64_t first = position * rates[block];
            for (int i = 0; i < frames * rates[block]; ++i) noise[block].push_back(float((first + i) % 7) - 3.f);
        }
        const dt_codec_call call{span(codes), frames, position, 4, {span(noise[0]), span(noise[1])},
                                 span(state), room(next_state), room(pcm)};
        expect(dt_codec_run(codec, &call) == DT_OK, "the codec runs", "", frames);
        sound.insert(sound.end(), pcm.begin(), pcm.end());
        state = next_state;
        position += frames;
    }
    return sound;
}

void check_codec(dt_context* c, const char* path) {
    dt_codec_spec spec{};
    spec.num_scales = 2, spec.vq_strides[0] = 2, spec.vq_strides[1] = 1;
    spec.codebook_size = 5, spec.codebook_dim = 1 + below(5), spec.latent_dim = 1 + below(12);
    spec.width = 4 * (1 + below(10)), spec.num_blocks = 2;
    spec.rates[0] = 1 + below(4), spec.rates[1] = 1 + below(4);
    spec.is_depthwise = below(2), spec.has_noise = below(2);
    // Finds the right number of weights; opening does not read them.
    std::vector<float> weights(1 << 18);
    dt_codec* codec = nullptr;
    for (spec.weights = span(weights.data(), 0); !codec; codec = dt_codec_open(c, &spec)) spec.weights.bytes += 64;
    dt_codec_close(codec);
    weights = normals(size_t(spec.weights.bytes) / sizeof(float));
    for (float& weight : weights) weight *= 0.2f;
    spec.weights = span(weights);
    codec = dt_codec_open(c, &spec);
    const std::vector<float> whole = codec_sound(codec, spec, {6}), cut = codec_sound(codec, spec, {1, 5});
    for (size_t i = 0; i < whole.size(); ++i) {
        expect(std::fabs(whole[i]) <= 1.f && whole[i] == cut[i], "cuts do not change the sound", path, double(i));
    }
    dt_codec_close(codec);
}

void check_kernels(dt_context* c, const char* path, int rounds) {
    for (int i = 0; i < rounds; ++i) {
        for (int group : {0, 32, 64, 128}) {
            check_linear(c, path, group);
            check_experts(c, path, group);
        }
        for (int kind : {0, 1}) check_attention(c, path, kind);
        check_snake(c, path);
        check_codec(c, path);
    }
}

void check_path(int index, bool is_hostile, int rounds) {
    const char* path = dt_path_name(index);
    for (int threads = 1; threads <= 3; ++threads) {
        dt_context* c = dt_open(index, threads);
        expect(c != nullptr, "a context opens", path, threads);
        if (!is_hostile) check_kernels(c, path, rounds);
        if (is_hostile && threads == 2) check_hostile(c, path, rounds);
        dt_close(c);
    }
    std::printf("%s: %d rounds on 1 to 3 threads\n", path, rounds);
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<std::string> words(argv + 1, argv + argc);
    const bool is_hostile = !words.empty() && words[0] == "hostile";
    if (is_hostile) words.erase(words.begin());
    const int rounds = words.empty() ? 20 : std::atoi(words[0].c_str());
    for (int path = 0; dt_path_name(path); ++path) {
        if (words.size() < 2 || words[1] == dt_path_name(path)) check_path(path, is_hostile, rounds);
    }
    return 0;
}
