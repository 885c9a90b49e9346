// Every activation but relu, which is so little that the maps have it in their loops. The others are a call for each
// register, so that the loops, of which there are many, need not hold all of them.

/// A dtype in the loops that make the call: in those of relu it would cost registers, and a fourth of the time.
template <class D>
struct Curved : D {};
template <class D>
constexpr bool kIsCurved = false;
template <class D>
constexpr bool kIsCurved<Curved<D>> = true;

template <class D>
struct ParameterOf<Curved<D>> : ParameterOf<D> {};

/// The activation's number, for those loops alone.
template <class D>
struct NumberOf {};
template <class D>
struct NumberOf<Curved<D>> {
  double value;
};

inline bool is_curved(Activation activation) { return activation > Activation::relu; }

template <class D>
struct FunctionsOf {
  typedef FloatsFunctions<Floats, Bits, (kNarrowing<D> > 1)> type;
};
template <>
struct FunctionsOf<Curved<F64>> {
  typedef DoublesFunctions<Vec<F64>> type;
};

template <class D>
__attribute__((noinline)) Vec<D> apply_activation(Activation kind, double number, Vec<D> z) {
  return activated<typename FunctionsOf<D>::type>(kind, typename D::Compute(number), z);
}
template <class D>
__attribute__((noinline)) Vec<D> through_activation(Activation kind, double number, Vec<D> z, Vec<D> dy) {
  return activated_gradient<typename FunctionsOf<D>::type>(kind, typename D::Compute(number), z, dy);
}
