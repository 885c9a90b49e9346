// What the .inl files need; they include nothing, because they stand inside a target region.
#pragma once
#include <utility>

#include "../kernels.h"
#include "../math/activation.h"
#include "../math/affine.h"
#include "../math/channel.h"
#include "../math/moments.h"
#include "../math/running.h"
#include "functions.h"
