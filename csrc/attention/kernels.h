// SPDX-License-Identifier: Apache-2.0
// All kernels of attention, in the order in which they need each other. Included once per
// instruction set, in its namespace.

#include "../tile_kernels.h"

#include "pack_kernels.h"

#include "few_kernels.h"

#include "forward_kernels.h"

#include "backward_kernels.h"
