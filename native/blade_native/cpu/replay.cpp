// A recorded step: its kernel calls in order, run without returning to Python in between.
#include "api.h"

struct Instruction {
    int (*kernel)(const void* call);
    const void* call;
};

// Returns the status of the first call that fails, else OK.
EXPORT int blade_replay(const Instruction* program, int64_t length) {
    for (int64_t i = 0; i < length; i++)
        if (int status = program[i].kernel(program[i].call)) return status;
    return OK;
}
