// SPDX-License-Identifier: Apache-2.0
// Compiles an operator's CPU kernels once for each instruction set and picks the set of this CPU.
//
// Include this file in the operator's namespace. TOKENOPS_KERNELS names a file, relative to csrc/,
// that defines `template <class T> Kernels<T> kernels()`. Each copy of its code has a namespace of
// its own; in the copy of avx512_bf16, which multiplies pairs of bfloat16, TOKENOPS_PAIRS is 1.
// Under TOKENOPS_NO_PAIRS there is no such copy.

namespace portable {
using namespace ::tokenops::portable;
#define TOKENOPS_PAIRS 0
#include TOKENOPS_KERNELS
}  // namespace portable

#if TOKENOPS_X86
TOKENOPS_TARGET_AVX2
namespace avx2 {
using namespace ::tokenops::avx2;
#include TOKENOPS_KERNELS
}  // namespace avx2
TOKENOPS_TARGET_END

TOKENOPS_TARGET_AVX512
namespace avx512 {
using namespace ::tokenops::avx512;
#include TOKENOPS_KERNELS
}  // namespace avx512
TOKENOPS_TARGET_END

#if !defined(TOKENOPS_NO_PAIRS)
TOKENOPS_TARGET_AVX512_BF16
namespace avx512_bf16 {
using namespace ::tokenops::avx512;
#undef TOKENOPS_PAIRS
#define TOKENOPS_PAIRS 1
#include TOKENOPS_KERNELS
}  // namespace avx512_bf16
TOKENOPS_TARGET_END
#endif
#endif

// The kernels for this CPU. `pairs`: whether bfloat16 may be multiplied in pairs, where it can.
template <class T>
static Kernels<T> kernels_for([[maybe_unused]] bool pairs = true) {
#if TOKENOPS_X86 && !defined(TOKENOPS_NO_PAIRS)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (pairs && isa() == Isa::avx512_bf16) return avx512_bf16::kernels<T>();
  }
#endif
  return TOKENOPS_KERNEL(kernels<T>)();
}
