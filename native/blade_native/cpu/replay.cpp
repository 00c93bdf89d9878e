// A recorded step: its kernel calls in order, run without returning to Python in between.
#include "linear_job.h"
#include "parallel.h"

struct Instruction {
    int (*kernel)(const void* call);
    const void* call;
};

extern "C" int blade_linear(const LinearCall* call);

namespace {
bool is_linear(const Instruction& instruction) { return (const void*)instruction.kernel == (const void*)blade_linear; }

// Threads that wait for their next work fetch weights meanwhile: those of the linear that comes next.
void expect(const Instruction& instruction) {
    const Job job(*(const LinearCall*)instruction.call);
    expect_parts(job.linear.weights, job.layout.panel_bytes(), job.cut);
}
}  // namespace

// Returns the status of the first call that fails, else OK.
EXPORT int blade_replay(const Instruction* program, int64_t length) {
    int status = OK;
    for (int64_t i = 0, next = 0; i < length && !status; i++) {
        if (next <= i) {
            for (next = i + 1; next < length && !is_linear(program[next]);) next++;
            if (next < length) expect(program[next]);
        }
        status = program[i].kernel(program[i].call);
    }
    expect_parts(nullptr, 0, Cut(1, 1, 1));
    return status;
}
