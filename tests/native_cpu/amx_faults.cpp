// Tile instructions as they must not be used, one case by name: what the emulated registers say to it.
#include <string>

#include "amx.h"

namespace {
alignas(64) char data[4096];

// Sums 0, activations 1, weights 2, and a fourth of part of a word; `change` makes them unsound.
template <class Change>
void multiply(Change change) {
    amx::Shapes shapes;
    auto shape = [&](int t, int rows, int bytes) { shapes.rows[t] = uint8_t(rows), shapes.row_bytes[t] = uint16_t(bytes); };
    shape(0, 3, 64), shape(1, 3, 32), shape(2, 8, 64), shape(3, 3, 30);
    change(shapes);
    amx::load_shapes(shapes);
    amx::zero<0>(), amx::load<1>(data, 64), amx::load<2>(data, 64);
    amx::dot_bytes<0, 1, 2>(), amx::dot_bf16<0, 1, 2>();
    amx::store<0>(data, 64);
}
}  // namespace

extern "C" __attribute__((visibility("default"))) const char* fault_of(const char* name) {
    const std::string which = name;
    emulated::fault = nullptr;
    amx::release_registers();
    auto sound = [](amx::Shapes&) {};
    if (which == "none") multiply(sound);
    if (which == "never shaped") amx::zero<0>();
    if (which == "released") multiply(sound), amx::release_registers(), amx::load<0>(data, 64);
    if (which == "unshaped register") multiply(sound), amx::store<7>(data, 64);
    if (which == "other rows") multiply([](amx::Shapes& s) { s.rows[0] = 4; });
    if (which == "other words") multiply([](amx::Shapes& s) { s.rows[2] = 7; });
    if (which == "other channels") multiply([](amx::Shapes& s) { s.row_bytes[2] = 32; });
    if (which == "one register twice") multiply(sound), amx::dot_bytes<0, 1, 1>();
    if (which == "part of a word") multiply(sound), amx::dot_bytes<0, 3, 2>();
    if (which == "too many rows") multiply([](amx::Shapes& s) { s.rows[0] = 17; });
    if (which == "too many bytes") multiply([](amx::Shapes& s) { s.row_bytes[0] = 68; });
    if (which == "rows without bytes") multiply([](amx::Shapes& s) { s.rows[5] = 1; });
    if (which == "unknown palette") multiply([](amx::Shapes& s) { s.palette = 2; });
    return emulated::fault;
}
