// Which table serves: the best that this CPU can run, unless TORCH_BN_CPU or force() names another.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../kernels.h"

namespace torch_bn::cpu {
namespace {

const Kernels* const* detect() {
  static const Kernels* tables[4] = {};
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    tables[count++] = &avx512;
  if (has_avx2) tables[count++] = &avx2;
#endif
  tables[count] = &baseline;
  return tables;
}

const Kernels* find(const char* name) {
  for (const Kernels* const* table = supported(); *table; ++table)
    if (!std::strcmp(name, (*table)->name)) return *table;
  return nullptr;
}

const Kernels* first_choice() {
  const char* wanted = std::getenv("TORCH_BN_CPU");
  const Kernels* table = wanted ? find(wanted) : nullptr;
  return table ? table : *supported();
}

std::atomic<const Kernels*>& choice() {
  static std::atomic<const Kernels*> chosen{first_choice()};
  return chosen;
}

}  // namespace

const Kernels* const* supported() {
  static const Kernels* const* const tables = detect();
  return tables;
}

const Kernels& selected() { return *choice().load(std::memory_order_relaxed); }

bool force(const char* name) {
  const Kernels* table = find(name);
  if (table) choice().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

}  // namespace torch_bn::cpu
