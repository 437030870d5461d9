// What is read next, asked for a few lines at a time among the arithmetic: a block of the cache is too short a run for the
// hardware to foresee the one after it, and asked for all at once its lines would hold up what is read now.
#pragma once

#include <stdint.h>

namespace quire {

constexpr int64_t kCacheLine = 64;  // bytes

template <int kMaxParts>
class Prefetch {
public:
    explicit Prefetch(int64_t part_bytes) : part_bytes_(part_bytes) {}

    // A part of memory; those after kMaxParts are not asked for.
    void add(const uint8_t* part) {
        if (num_parts_ < kMaxParts) parts_[num_parts_++] = part;
    }

    // Ask for the next lines of the parts, until there are none.
    void ask(int lines) {
        for (int i = 0; i < lines && part_ < num_parts_; ++i) {
            __builtin_prefetch(parts_[part_] + at_, 0, 2);
            at_ += kCacheLine;
            if (at_ >= part_bytes_) at_ = 0, ++part_;
        }
    }

private:
    const uint8_t* parts_[kMaxParts];
    const int64_t part_bytes_;
    int64_t at_ = 0;
    int num_parts_ = 0, part_ = 0;
};

}  // namespace quire
