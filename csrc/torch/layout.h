// How a tensor lies in memory, as the kernels see it: the view of sizes and strides as Extent and Strides.
// Only ops.cpp includes this.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>

#include "../kernels.h"

namespace torch_bn {

/// A new tensor on the device of another. NB: at::empty goes through the dispatcher, which for a small layer costs more
/// than what it finds there.
inline at::Tensor make_empty(at::IntArrayRef sizes, const at::Tensor& like, at::ScalarType type,
                             at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  if (like.is_cpu()) return at::Tensor(at::detail::empty_cpu(sizes, type, /*pin_memory=*/false, format));
  return at::empty(sizes, like.options().dtype(type).memory_format(format));
}

/// The stride with which the dimensions from `first` to `last` of `order` are walked as one, 0 if they have one
/// element; none if they cannot be.
inline std::optional<int64_t> merged(const at::Tensor& t, const int64_t* first, const int64_t* last) {
  int64_t base = 0, next = -1;
  for (; first != last; ++first) {
    const int64_t size = t.size(*first), stride = t.stride(*first);
    if (size == 1) continue;
    if (next == -1)
      base = stride;
    else if (stride != next)
      return std::nullopt;
    next = stride * size;
  }
  return base;
}

/// The order in which a freshly made tensor of some memory format holds its dimensions, cut at the channel axis.
class Layout {
 public:
  /// That of the output for `input`: channels_last where the input suggests it, else contiguous.
  Layout(const at::Tensor& input, int64_t axis, int64_t groups = 1);

  const Extent& extent() const { return extent_; }

  /// A new tensor in this layout, on the device and of the dtype of another.
  at::Tensor empty(const at::Tensor& like) const;

  /// The strides of a tensor of these sizes, if its dimensions merge to those of the extent.
  std::optional<Strides> strides(const at::Tensor& tensor) const;

  /// Replaces `tensor` by a copy in this layout if it does not merge as it is, or so many neighbours cannot be read at
  /// once. Of a tensor that repeats a single element only one row or plane is made.
  Strides fit(at::Tensor& tensor, int64_t neighbours) const;

 private:
  bool aligned(const at::Tensor& tensor, const Strides& strides, int64_t neighbours) const;

  at::MemoryFormat format_;
  c10::SmallVector<int64_t, 5> sizes_, order_;  // order_: dimensions from the innermost
  int64_t axis_;
  Extent extent_;
};

inline Layout::Layout(const at::Tensor& input, int64_t axis, int64_t groups)
    : format_(input.suggest_memory_format()), sizes_(input.sizes().begin(), input.sizes().end()), axis_(axis) {
  const bool channels_last = format_ == at::MemoryFormat::ChannelsLast || format_ == at::MemoryFormat::ChannelsLast3d;
  if (channels_last) order_.push_back(1);
  for (int64_t i = input.dim() - 1; i >= 0; --i)
    if (!channels_last || i != 1) order_.push_back(i);
  if (sizes_[axis] == 1 && groups == 1) {  // everything is one plane, whatever the place of the axis
    order_.erase(std::find(order_.begin(), order_.end(), axis));
    order_.push_back(axis);
  }
  extent_ = {.outer = 1, .channels = sizes_[axis], .inner = 1};
  bool outer = false;
  for (const int64_t i : order_) {
    if (i == axis)
      outer = true;
    else
      (outer ? extent_.outer : extent_.inner) *= sizes_[i];
  }
  if (groups > 1 && sizes_[0] > 0) {  // then the examples, dimension 0, are outermost
    extent_.groups = groups;
    extent_.outer_per_example = extent_.outer / sizes_[0];
  }
}

inline at::Tensor Layout::empty(const at::Tensor& like) const {
  return make_empty(sizes_, like, like.scalar_type(), format_);
}

inline std::optional<Strides> Layout::strides(const at::Tensor& t) const {
  const int64_t* axis = std::find(order_.begin(), order_.end(), axis_);
  const auto inner = merged(t, order_.begin(), axis), outer = merged(t, axis + 1, order_.end());
  const int64_t channel = t.stride(axis_);
  const bool adjacent = extent_.inner > 1 ? inner == 1 : channel == 1 || extent_.channels == 1;
  if (!inner || !outer || !adjacent) return std::nullopt;
  return Strides{*outer, channel};
}

inline bool Layout::aligned(const at::Tensor& t, const Strides& s, int64_t neighbours) const {
  if (neighbours == 1) return true;
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return address % (neighbours * t.element_size()) == 0 && s.outer % neighbours == 0 &&
         (extent_.inner == 1 || s.channel % neighbours == 0);
}

inline Strides Layout::fit(at::Tensor& t, int64_t neighbours) const {
  if (const auto found = strides(t); found && aligned(t, *found, neighbours)) return *found;
  const bool repeats = std::all_of(t.strides().begin(), t.strides().end(), [](int64_t stride) { return stride == 0; });
  if (repeats) {
    const int64_t adjacent = extent_.inner > 1 ? extent_.inner : extent_.channels;
    t = t.as_strided({adjacent}, {0}).contiguous();
    return {0, extent_.inner > 1 ? 0 : 1};
  }
  t = t.clone(format_);
  return *strides(t);
}

}  // namespace torch_bn
