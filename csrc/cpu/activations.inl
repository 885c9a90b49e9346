// Every activation but relu, which is so little that the maps have it in their loops. The others are found between loops,
// for many elements at a time: within, each register would be a call, and the loop would lose all others to it.
// Included after loops.inl, inside a target region and an anonymous namespace.

/// A dtype in the loops around that: those of relu would lose registers to it, and a fourth of their time. In order, as
/// what lies between the loops is.
template <class D>
struct Curved : D {
  static constexpr bool kAlternates = false;
};
template <class D>
constexpr bool kIsCurved = false;
template <class D>
constexpr bool kIsCurved<Curved<D>> = true;

template <class D>
struct ParameterOf<Curved<D>> : ParameterOf<D> {};

inline bool is_curved(Activation activation) { return activation > Activation::relu; }

template <class D>
struct FunctionsOf {
  typedef FloatsFunctions<Floats, Bits, (kNarrowing<D> > 1)> type;
};
template <>
struct FunctionsOf<Curved<F64>> {
  typedef DoublesFunctions<Vec<F64>> type;
};

/// An activation as a type.
template <Activation kActivation>
struct Only {
  static constexpr Activation value = kActivation;
};

/// Calls f with the activation as a type, so that its loop holds nothing of the others.
template <class F>
BN_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return f(Only<Activation::relu>{});
    case Activation::leaky_relu: return f(Only<Activation::leaky_relu>{});
    case Activation::elu: return f(Only<Activation::elu>{});
    case Activation::silu: return f(Only<Activation::silu>{});
    case Activation::gelu: return f(Only<Activation::gelu>{});
    case Activation::gelu_tanh: return f(Only<Activation::gelu_tanh>{});
    case Activation::hardswish: return f(Only<Activation::hardswish>{});
  }
}

/// Of n adjacent values, in whole registers: z becomes y.
template <class M, class P>
__attribute__((noinline)) void activate_all(Activation activation, double number, int64_t n, typename P::Compute* z) {
  with_activation(activation, [=](auto kind) BN_INLINED {
    for (int64_t i = 0; i < n; i += kLanes<P>)
      store<P>(z + i, activated<M>(kind.value, typename P::Compute(number), load<P>(z + i)));
  });
}
/// The same, of z and dy to dz. silu's exponential is found in a loop before the rest: a processor holds back so few
/// operations that wait for others that in one loop, a chain of twenty, they take a third more time.
template <class D>
__attribute__((noinline)) void differentiate_all(Activation activation, double number, int64_t n,
                                                 const typename D::Compute* z, const typename D::Element* dy,
                                                 typename D::Compute* dz) {
  using P = Parameter<D>;
  using M = typename FunctionsOf<D>::type;
  with_activation(activation, [=](auto kind) BN_INLINED {
    constexpr bool kInTwoSteps = kind.value == Activation::silu;
    if constexpr (kInTwoSteps)
      for (int64_t i = 0; i < n; i += kLanes<P>) store<P>(dz + i, falling<M>(load<P>(z + i)));
    each_register<D>(0, n, [=](int64_t i, auto count) BN_INLINED {
      const Vec<P> at = load<P>(z + i);
      const Vec<D> gradient = load<D>(dy + i, count);
      if constexpr (kInTwoSteps) store<P>(dz + i, silu_gradient<M>(at, gradient, logistic<M>(at, load<P>(dz + i))));
      else store<P>(dz + i, activated_gradient<M>(kind.value, typename D::Compute(number), at, gradient));
    });
  });
}

/// Adjacent elements on their way through an activation, in the compute type: few enough for the nearest cache.
template <class D>
struct CurvedBlock {
  static constexpr int64_t kMost = kPlaneBlock;
  static constexpr int64_t kRoom = kMost + kCacheSkew / sizeof(typename D::Compute);
  alignas(64) typename D::Compute z[kRoom], gradient[kRoom];

  void activate(Activation activation, double number, int64_t n) {
    activate_all<typename FunctionsOf<D>::type, Parameter<D>>(activation, number, n, z);
  }
  void differentiate(Activation activation, double number, int64_t n, const typename D::Element* dy) {
    differentiate_all<D>(activation, number, n, z, dy, gradient);
  }
};
