// The entries of the table: from the dtype in the params to the pass that is compiled for it.

/// Calls f with the type that stands for a dtype.
template <class F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(F32{});
    case DType::f64: return f(F64{});
    case DType::bf16: return f(BF16{});
    case DType::f16: return f(F16{});
  }
}

int64_t mask_bytes(DType dtype, const Extent& e) {
  int64_t bytes = 0;
  with_dtype(dtype, [&](auto d) { bytes = bytes_of_mask<decltype(d)>(e); });
  return bytes;
}

void forward(const ForwardParams& p, const Executor& executor) {
  with_dtype(p.dtype, [&](auto d) { run(steps_of(Forward<decltype(d)>(p, executor)), executor); });
}

void backward(const BackwardParams& p, const Executor& executor) {
  with_dtype(p.dtype, [&](auto d) { run(steps_of(Backward<decltype(d)>(p, executor)), executor); });
}

void inference(const InferenceParams& p, const Executor& executor) {
  with_dtype(p.dtype, [&](auto d) { run_map_alone(steps_of(Inference<decltype(d)>(p, executor)), executor); });
}

template <class T>
void update(const UpdateParams& p) {
  const RunningStep step = step_of<T>(p.running);
  count_batch<T>(p.running, step);
  by_blocks({0, p.channels}, [&](Range block) {
    double mean[kChannels], variance[kChannels];
    read_parameter<double>(p.statistics, block, 0, mean);
    read_parameter<double>(p.statistics + p.channels, block, 0, variance);
    update_channels<T>(p.running, step, block, mean, variance, p.eps);
  });
}

void update(const UpdateParams& p) {
  with_dtype(p.dtype, [&](auto d) { update<typename decltype(d)::Compute>(p); });
}
