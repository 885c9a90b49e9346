// How pieces of work are shared by the threads. Each has a run of them, which are adjacent in memory; what one that fell
// behind has left goes to those that are done.

template <class Body>
void parallel_for(const Executor& executor, int64_t count, int64_t grain, const Body& body) {
  executor.parallel_for(
      count, grain,
      [](void* context, int64_t first, int64_t last) { (*static_cast<const Body*>(context))(first, last); },
      const_cast<Body*>(&body));
}

/// The pieces of one thread that nobody has begun: it takes them from one end, the others from the other.
class alignas(64) Share {
 public:
  void set(int64_t first, int64_t last) { rest_ = uint64_t(first) << 32 | uint64_t(last); }

  bool take(bool from_end, int64_t& piece) {
    uint64_t rest = now();
    while (first_of(rest) < last_of(rest)) {
      piece = from_end ? last_of(rest) - 1 : first_of(rest);
      const uint64_t fewer = from_end ? rest - 1 : rest + (uint64_t(1) << 32);
      if (__atomic_compare_exchange_n(&rest_, &rest, fewer, /*weak=*/true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return true;
    }
    return false;
  }
  bool is_empty() const {
    const uint64_t rest = now();
    return first_of(rest) >= last_of(rest);
  }

 private:
  uint64_t now() const { return __atomic_load_n(&rest_, __ATOMIC_RELAXED); }
  static int64_t first_of(uint64_t rest) { return int64_t(rest >> 32); }
  static int64_t last_of(uint64_t rest) { return int64_t(uint32_t(rest)); }
  uint64_t rest_;  // both in one word, so that no two threads take the same piece
};

/// Calls work(i, more) once for each piece i in [0, count), in order or from the end; more: whether i + 1 is likely the
/// thread's next. No thread is woken for less than `grain` pieces.
template <class Work>
void share_pieces(const Executor& executor, int64_t count, int64_t grain, bool from_end, const Work& work) {
  constexpr int64_t kMostShares = 256, kMostPieces = (int64_t(1) << 32) - 1;
  const int64_t wanted = least(least(executor.threads, kMostShares), ceil_div(count, grain));
  const int64_t shares = count > kMostPieces ? 1 : wanted;
  if (shares <= 1) {
    for (int64_t k = 0; k < count; ++k) work(from_end ? count - 1 - k : k, !from_end && k + 1 < count);
    return end_streaming();
  }
  Share share[kMostShares];
  for (int64_t k = 0; k < shares; ++k) share[k].set(count * k / shares, count * (k + 1) / shares);
  parallel_for(executor, shares, 1, [&](int64_t first, int64_t last) {
    int64_t piece;
    for (int64_t own = first; own < last; ++own)
      while (share[own].take(from_end, piece)) work(piece, !from_end && !share[own].is_empty());
    for (int64_t k = 1; k < shares; ++k)
      for (Share& other = share[(first + k) % shares]; other.take(!from_end, piece);) work(piece, false);
    end_streaming();
  });
}
