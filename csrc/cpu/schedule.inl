// In which pieces a pass is done, and in which order. Compiled once for all passes.

constexpr int64_t kSerialElements = 1 << 15;  // less is not worth waking a thread

/// The steps of a pass, each over some channels or columns of channels; `self` is the pass. What is walked are the channels
/// of one group behind those of another.
struct Steps {
  const void* self;
  Extent extent;  // folded
  Folding folding;
  Partition cut;
  int64_t inputs, element_bytes, column_block, run;
  int64_t together;     // channels that no two threads may map: they share bytes of a mask
  bool map_reads_more;  // than the reduction
  void (*prepare)(const void* self, Range walked);
  void (*reduce)(const void* self, int64_t group, int64_t slice, Range columns, int64_t next);  // planes: groups in turn
  void (*finish)(const void* self, Range walked);
  void (*conclude)(const void* self, Range channels);  // when those are finished in all groups
  void (*map)(const void* self, Range outers, Range columns, int64_t next);
};

template <class Pass>
Steps steps_of(const Pass& pass) {
  using D = typename Pass::Type;
  return {&pass, pass.p.extent, pass.folding, pass.work.cut, Pass::kInputs,
          sizeof(typename D::Element), kColumnBlock<D>, pass.run, pass.together, pass.map_reads_more(),
          [](const void* self, Range walked) { static_cast<const Pass*>(self)->prepare(walked); },
          [](const void* self, int64_t group, int64_t slice, Range columns, int64_t next) {
            static_cast<const Pass*>(self)->reduce(group, slice, columns, next);
          },
          [](const void* self, Range walked) { static_cast<const Pass*>(self)->finish(walked); },
          [](const void* self, Range channels) { static_cast<const Pass*>(self)->conclude(channels); },
          [](const void* self, Range outers, Range columns, int64_t next) {
            static_cast<const Pass*>(self)->map(outers, columns, next);
          }};
}

/// The last map over everything, tile by tile: some rows, or some planes of a few outers, of one group after another. Tiles of
/// rows are large, as they are quicker to map, where all threads still have many.
void run_map(const Steps& steps, const Executor& executor, bool from_end) {
  constexpr int64_t kTile = 1 << 15, kLargeTile = 1 << 17, kMany = 16, kRows = 32, kWidest = 8192;
  const Extent& e = steps.extent;
  const bool rows = e.inner == 1;
  const int64_t shared = e.outer * e.channels / (kMany * executor.threads);
  const int64_t row_tile = least(kLargeTile, most(kTile, shared));
  const int64_t planes = ceil_div(ceil_div(kTile, kPlanesInTurn * e.inner), steps.together) * steps.together;
  const int64_t width = least(e.channels, rows ? kWidest : planes);
  const int64_t across = ceil_div(e.channels, width);
  const int64_t run = e.groups == 1 ? e.outer : e.outer_per_example;  // outers of one group, one after another
  const int64_t height = least(run, rows ? most(kRows, row_tile / width) : kPlanesInTurn), down = ceil_div(run, height);
  const int64_t grain = ceil_div(kSerialElements, width * height * e.inner);
  const Grouping grouping(e);
  share_pieces(executor, e.outer / run * down * across, grain, from_end, [&](int64_t tile, bool) {
    const int64_t column = tile % across * width, piece = tile / across, from = piece % down * height;
    const int64_t outer = e.groups == 1 ? 0 : grouping.first_outer(piece / down);
    steps.map(steps.self, {outer + from, outer + least(run, from + height)}, {column, least(e.channels, column + width)}, 0);
  });
}

/// What is left to do when all groups are finished.
void conclude(const Steps& steps, const Executor& executor) {
  const int64_t groups = steps.extent.groups * steps.folding.groups;
  parallel_for(executor, steps.folding.channels / steps.folding.groups, ceil_div(1 << 10, groups),
               [&](int64_t first, int64_t last) { steps.conclude(steps.self, {first, last}); });
}

/// Block of channels by block of channels, so that the map finds in the cache what the reduction has read, and both ask
/// for what the next reduction reads: the channels that are `next` further on. The columns of a block are adjacent unless
/// rows are folded; then there is one block.
void run_blocks(const Steps& steps, const Executor& executor, int64_t block, int64_t grain) {
  const Extent& e = steps.extent;
  const Folding& f = steps.folding;
  const int64_t slices = steps.cut.slices;
  share_pieces(executor, ceil_div(f.channels, block), grain, false, [&](int64_t i, bool more) {
    const Range channels{i * block, least(f.channels, (i + 1) * block)};
    const Range columns{channels.first * f.repeat, channels.last * f.repeat * f.fold};
    const int64_t next = e.inner > 1 && more ? block : 0;
    const auto in_all_groups = [&](auto step) {
      for (int64_t group = 0, at = 0; group < e.groups; ++group, at += f.channels)
        step(steps.self, {at + channels.first, at + channels.last});
    };
    in_all_groups(steps.prepare);
    for (int64_t group = 0; group < e.groups; ++group)
      for (int64_t slice = 0; slice < slices; ++slice) steps.reduce(steps.self, group, slice, columns, next);
    in_all_groups(steps.finish);
    if (f.groups == 1) steps.conclude(steps.self, channels);
    steps.map(steps.self, {0, e.outer}, columns, next);
  });
  if (f.groups > 1) conclude(steps, executor);
}

/// Each step over everything, one after another.
void run_steps(const Steps& steps, const Executor& executor) {
  const Extent& e = steps.extent;
  const bool rows = e.inner == 1;
  const int64_t slices = steps.cut.slices, apart = rows ? e.groups : 1, together = e.groups / apart;
  const int64_t block = rows ? steps.column_block : 1, blocks = ceil_div(e.channels, block);
  const int64_t elements = e.outer * e.inner * least(block, e.channels) / (apart * slices);
  const auto over_channels = [&](const auto& step) {
    parallel_for(executor, e.groups * steps.folding.channels, ceil_div(1 << 10, slices),
                 [&](int64_t first, int64_t last) { step({first, last}); });
  };
  over_channels([&](Range walked) { steps.prepare(steps.self, walked); });
  share_pieces(executor, apart * slices * blocks, ceil_div(kSerialElements, elements + 1), false, [&](int64_t i, bool) {
    const int64_t part = i / blocks, begin = i % blocks * block, group = part / slices * together;
    const Range columns{begin, least(e.channels, begin + block)};
    for (int64_t g = group; g < group + together; ++g) steps.reduce(steps.self, g, part % slices, columns, 0);
  });
  const bool one_group = e.groups * steps.folding.groups == 1;
  over_channels([&](Range walked) {
    steps.finish(steps.self, walked);
    if (one_group) steps.conclude(steps.self, walked);
  });
  if (!one_group) conclude(steps, executor);
  // What fills the last-level cache is mapped from the end, which the reduction has surely left there; where the map reads
  // something new beside it, which is quickest in order, only what the cache cannot hold.
  const int64_t bytes = steps.inputs * e.outer * e.channels * e.inner * steps.element_bytes;
  run_map(steps, executor, bytes > (steps.map_reads_more ? executor.cache_bytes : executor.cache_bytes / 4 * 3));
}

/// How many channels of planes are taken at once: neighbours make one run of memory, and all stay in a core's own cache
/// until they are mapped, while the next come. With two inputs few. Groups need many, as each block has some work for each
/// of them. Whole runs, unless some threads would have none. A power of two, which threads share evenly.
/// Less than AVX-512 has half as many where nothing but x is read. AVX2, where planes are walked one by one, has as many as
/// make a run of kLongRun elements in each example: short runs are slow to read and to write past the cache, so it pays even
/// if only the last-level cache holds the block. Both as measured.
int64_t channels_at_once(const Steps& steps, int threads) {
  constexpr int64_t kMany = 64, kLongRun = 4096, kLargestBlock = 1 << 21;
  const bool small = BN_VECTOR_BYTES < 64 && steps.inputs == 1 && !steps.map_reads_more;
  const int64_t cache_bytes = small ? 1 << 17 : 1 << 18;
  const Extent& e = steps.extent;
  const int64_t bytes = e.outer * e.inner * steps.element_bytes * steps.inputs, shared = e.channels / (2 * threads);
  const bool many = steps.inputs == 1 || e.groups > 1;
  const int64_t fitting = least(many ? kMany : kPlanes, cache_bytes / bytes);
  const int64_t in_long_run = BN_VECTOR_BYTES == 32 ? least(least(kMany, kLongRun / e.inner), kLargestBlock / bytes) : 0;
  const int64_t in_run = steps.run > 0 ? steps.run : in_long_run;
  return most(power_of_two(least(most(fitting, in_run), shared)), steps.together);
}

/// Chooses between the two: blocks of channels where their planes are long runs of memory and there are enough of them
/// for all threads. Rows are read whole, in order: parts of rows would be short runs, far apart.
void run(const Steps& steps, const Executor& executor) {
  const Extent& e = steps.extent;
  const int64_t per_channel = e.outer * e.inner, columns = steps.folding.repeat * steps.folding.fold;
  if (per_channel * e.channels <= kSerialElements && e.channels <= steps.column_block)
    return run_blocks(steps, executor, e.channels / columns, 1);
  if (e.inner > 1 && e.channels >= 2 * executor.threads) {
    const int64_t block = channels_at_once(steps, executor.threads);
    return run_blocks(steps, executor, block, ceil_div(kSerialElements, per_channel * block));
  }
  run_steps(steps, executor);
}

/// A map that no reduction precedes: in the order of memory, but for runs, whose coefficients are spread once for all outers.
void run_map_alone(const Steps& steps, const Executor& executor) {
  const int64_t block = channels_at_once(steps, executor.threads);
  if (steps.run > 0 && block >= steps.run)
    return run_blocks(steps, executor, block, ceil_div(kSerialElements, steps.extent.outer * steps.extent.inner * block));
  run_map(steps, executor, false);
}
