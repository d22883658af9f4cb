// pack_groups: groups of responses into bins of fixed capacity. The method of r4b_kernels/pack_groups/cpu.py, decision
// for decision, so that both give the same plan; its comments say why. Integers are tokens unless named otherwise.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "stable.h"

namespace {

using Integers = std::vector<int64_t>;

constexpr int kSmallerCapacities = 5;
constexpr int kShifts = 32;
constexpr double kEven = 1.002;
constexpr double kEvenEnough = 1.01;
constexpr double kGain = 1e-9;
constexpr double kLeastCut = 1.0 / 16;

// Views of the caller's memory.
struct Problem {
  const int64_t* prefixes;  // [groups]
  const int64_t* lengths;   // [responses], group after group
  const int64_t* offsets;   // [groups + 1] into lengths
  const double* vision;     // [groups]
  int64_t groups, capacity, ranks;
  bool share_prefix, split;
  double token_cost, pair_cost;
};

struct Atom {
  int64_t length, member;
  bool operator<(const Atom& other) const {
    return std::tie(length, member) < std::tie(other.length, other.member);
  }
};

// What is placed: atoms in ascending order under a prefix that each bin pays once.
struct Item {
  int64_t group, prefix, size;
  std::vector<Atom> atoms;
};

struct Piece {
  int64_t group;
  Integers members;
};

using Bin = std::vector<Piece>;

// Tokens count prefixes as often as they are paid; items of at most whole_up_to tokens were not allowed to be cut.
struct Packing {
  std::vector<Bin> bins;
  int64_t tokens, whole_up_to;
};

struct Plan {
  std::vector<Bin> bins;
  Integers rank_of_bin;
  std::vector<double> costs;
  double imbalance;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::vector<Item> items_of(const Problem& problem) {
  std::vector<Item> items;
  for (int64_t group = 0; group < problem.groups; ++group) {
    const int64_t prefix = problem.prefixes[group], first = problem.offsets[group];
    const int64_t count = problem.offsets[group + 1] - first;
    const bool together = problem.share_prefix || !problem.split;
    Item item{group, problem.share_prefix ? prefix : 0, 0, {}};
    for (int64_t member = 0; member < count; ++member) {
      item.atoms.push_back({problem.lengths[first + member] + (problem.share_prefix ? 0 : prefix), member});
      if (!together || member + 1 == count) {
        std::sort(item.atoms.begin(), item.atoms.end());
        item.size = item.prefix;
        for (const Atom& atom : item.atoms) item.size += atom.length;
        items.push_back(std::move(item));
        item = {group, problem.share_prefix ? prefix : 0, 0, {}};
      }
    }
  }
  return items;
}

// Descending by size, by what the smallest home must hold, and by a mixture.
std::vector<Integers> orders_of(const std::vector<Item>& items) {
  const auto descending = [&](auto key) {
    std::vector<std::pair<int64_t, int64_t>> keyed;
    for (size_t i = 0; i < items.size(); ++i) keyed.emplace_back(-key(items[i]), static_cast<int64_t>(i));
    std::sort(keyed.begin(), keyed.end());
    Integers order;
    for (const auto& [_, i] : keyed) order.push_back(i);
    return order;
  };
  std::vector<Integers> orders{descending([](const Item& item) { return item.size; })};
  if (std::any_of(items.begin(), items.end(), [](const Item& item) { return item.atoms.size() > 1; })) {
    orders.push_back(descending([](const Item& item) { return item.prefix + item.atoms.back().length; }));
    orders.push_back(descending([](const Item& item) { return 16 * item.prefix + item.size; }));
  }
  return orders;
}

// The bins that are open, ascending by (free tokens, bin).
class OpenBins {
 public:
  bool empty() const { return open_.empty(); }

  // The fullest bin that takes size tokens.
  std::optional<std::pair<int64_t, int64_t>> take_fitting(int64_t size) {
    const auto found = std::lower_bound(open_.begin(), open_.end(), std::pair<int64_t, int64_t>{size, -1});
    if (found == open_.end()) return std::nullopt;
    const auto bin = *found;
    open_.erase(found);
    return bin;
  }

  std::pair<int64_t, int64_t> take_emptiest() {
    const auto bin = open_.back();
    open_.pop_back();
    return bin;
  }

  void put(int64_t free, int64_t bin) {
    const std::pair<int64_t, int64_t> entry{free, bin};
    open_.insert(std::upper_bound(open_.begin(), open_.end(), entry), entry);
  }

 private:
  std::vector<std::pair<int64_t, int64_t>> open_;
};

// Moves the longest atoms that fit into the gap over to members, and returns what is left of the gap.
int64_t cut(std::vector<Atom>& rest, int64_t gap, Integers& members) {
  while (true) {
    const auto next = std::upper_bound(
        rest.begin(), rest.end(), gap, [](int64_t value, const Atom& atom) { return value < atom.length; });
    if (next == rest.begin()) return gap;
    gap -= std::prev(next)->length;
    members.push_back(std::prev(next)->member);
    rest.erase(std::prev(next));
  }
}

// Place everything into count bins, or nothing. Cuts only what exceeds whole_up_to tokens.
std::optional<Packing> attempt(
    const std::vector<Item>& items, const Integers& order, int64_t capacity, int64_t count, int64_t whole_up_to) {
  int64_t tokens = 0;
  for (const Item& item : items) tokens += item.size;
  const int64_t room = count * capacity;
  if (tokens > room) return std::nullopt;
  std::vector<Bin> bins(count);
  OpenBins open;
  int64_t opened = 0;
  for (const int64_t index : order) {
    const Item& item = items[index];
    std::vector<Atom> rest = item.atoms;
    int64_t size = item.size;
    while (true) {
      int64_t free = 0, bin = 0;
      if (const auto fitting = open.take_fitting(size)) {
        std::tie(free, bin) = *fitting;
      } else if (opened < count) {
        free = capacity, bin = opened++;
      } else if (!open.empty()) {
        std::tie(free, bin) = open.take_emptiest();
      } else {
        return std::nullopt;
      }
      Integers members;
      if (size <= free) {
        for (const Atom& atom : rest) members.push_back(atom.member);
        bins[bin].push_back({item.group, std::move(members)});
        open.put(free - size, bin);
        break;
      }
      if (item.size <= whole_up_to) return std::nullopt;
      const int64_t gap = cut(rest, free - item.prefix, members);
      if (members.empty()) return std::nullopt;
      bins[bin].push_back({item.group, std::move(members)});
      open.put(gap, bin);
      size = item.prefix;
      for (const Atom& atom : rest) size += atom.length;
      tokens += item.prefix;
      if (tokens > room) return std::nullopt;
    }
  }
  return Packing{std::move(bins), tokens, whole_up_to};
}

// Gallop and bisect over the bins per rank; then keep groups whole if that many bins allow it.
Packing fewest_bins(const Problem& problem, const std::vector<Item>& items, const std::vector<Integers>& orders) {
  const auto first_of = [&](int64_t per_rank, int64_t whole_up_to) {
    for (const Integers& order : orders) {
      auto packing = attempt(items, order, problem.capacity, per_rank * problem.ranks, whole_up_to);
      if (packing) return packing;
    }
    return std::optional<Packing>();
  };
  const int64_t whole_up_to = problem.split ? 0 : problem.capacity;
  int64_t total = 0;
  for (const Item& item : items) total += item.size;
  int64_t enough = std::max<int64_t>(ceil_div(total, problem.capacity * problem.ranks), 1), step = 1;
  int64_t failed = enough - 1;
  auto best = first_of(enough, whole_up_to);
  while (!best) {
    failed = enough;
    enough += step;
    step *= 2;
    best = first_of(enough, whole_up_to);
  }
  while (enough - failed > 1) {
    const int64_t middle = (failed + enough) / 2;
    if (auto packing = first_of(middle, whole_up_to)) {
      best = std::move(packing);
      enough = middle;
    } else {
      failed = middle;
    }
  }
  if (!problem.split || orders.size() == 1) return *std::move(best);
  std::optional<Packing> least;
  for (const int64_t whole : {problem.capacity, int64_t{0}}) {
    for (const Integers& order : orders) {
      auto packing = attempt(items, order, problem.capacity, enough * problem.ranks, whole);
      if (packing && (!least || packing->tokens < least->tokens)) least = std::move(packing);
    }
    if (least) break;
  }
  return *std::move(least);
}

// One piece per group, ascending: two pieces of a group may have met in a bin.
void merge(Bin& bin) {
  std::stable_sort(bin.begin(), bin.end(), [](const Piece& a, const Piece& b) { return a.group < b.group; });
  Bin merged;
  for (Piece& piece : bin) {
    if (merged.empty() || merged.back().group != piece.group) {
      merged.push_back(std::move(piece));
    } else {
      auto& members = merged.back().members;
      members.insert(members.end(), piece.members.begin(), piece.members.end());
    }
  }
  for (Piece& piece : merged) std::sort(piece.members.begin(), piece.members.end());
  bin = std::move(merged);
}

int64_t tokens_of(const Problem& problem, const Piece& piece) {
  const int64_t* lengths = problem.lengths + problem.offsets[piece.group];
  const int64_t copies = problem.share_prefix ? 1 : static_cast<int64_t>(piece.members.size());
  int64_t tokens = copies * problem.prefixes[piece.group];
  for (const int64_t member : piece.members) tokens += lengths[member];
  return tokens;
}

double cost_of(const Problem& problem, const Piece& piece) {
  const int64_t prefix = problem.prefixes[piece.group];
  const int64_t* lengths = problem.lengths + problem.offsets[piece.group];
  const int64_t copies = problem.share_prefix ? 1 : static_cast<int64_t>(piece.members.size());
  int64_t pairs = copies * (prefix * (prefix + 1) / 2);
  for (const int64_t member : piece.members) {
    pairs += lengths[member] * (lengths[member] + 1) / 2 + lengths[member] * prefix;
  }
  const double linear = problem.token_cost * static_cast<double>(tokens_of(problem, piece));
  const double quadratic = problem.pair_cost * static_cast<double>(pairs);
  return linear + quadratic + static_cast<double>(copies) * problem.vision[piece.group];
}

int64_t tokens_of(const Problem& problem, const Bin& bin) {
  int64_t tokens = 0;
  for (const Piece& piece : bin) tokens += tokens_of(problem, piece);
  return tokens;
}

double cost_of(const Problem& problem, const Bin& bin) {
  double cost = 0.0;
  for (const Piece& piece : bin) cost += cost_of(problem, piece);
  return cost;
}

// Swap one bin of the dearest rank with one of the cheapest rank that helps; false if none does.
bool exchange(std::vector<Integers>& shares, std::vector<double>& totals, const std::vector<double>& costs) {
  std::vector<std::pair<double, int64_t>> ranks;
  for (size_t rank = 0; rank < totals.size(); ++rank) ranks.emplace_back(totals[rank], static_cast<int64_t>(rank));
  std::sort(ranks.begin(), ranks.end());
  const int64_t dearest = ranks.back().second;
  ranks.pop_back();
  for (const auto& [_, other] : ranks) {
    const double gap = totals[dearest] - totals[other];
    double best = gap * (1 - kGain);
    int64_t* swap[2] = {nullptr, nullptr};
    for (int64_t& mine : shares[dearest]) {
      for (int64_t& theirs : shares[other]) {
        const double left = std::abs(gap - 2 * (costs[mine] - costs[theirs]));
        if (left < best) best = left, swap[0] = &mine, swap[1] = &theirs;
      }
    }
    if (swap[0] != nullptr) {
      const double mine = costs[*swap[0]], theirs = costs[*swap[1]];
      std::swap(*swap[0], *swap[1]);
      totals[dearest] += theirs - mine;
      totals[other] += mine - theirs;
      return true;
    }
  }
  return false;
}

std::vector<double> rank_costs(const Plan& plan, int64_t ranks) {
  std::vector<double> totals(ranks, 0.0);
  for (size_t bin = 0; bin < plan.costs.size(); ++bin) totals[plan.rank_of_bin[bin]] += plan.costs[bin];
  return totals;
}

double mean_of(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double imbalance_of(const Plan& plan, int64_t ranks) {
  const std::vector<double> totals = rank_costs(plan, ranks);
  const double mean = mean_of(totals);
  return mean > 0 ? *std::max_element(totals.begin(), totals.end()) / mean : 1.0;
}

// Dearest bin first to the cheapest rank that lacks bins; then exchanges that lower the dearest rank.
Plan deal(const Problem& problem, const Packing& packing) {
  Plan plan{packing.bins, Integers(packing.bins.size()), {}, 1.0};
  for (Bin& bin : plan.bins) {
    merge(bin);
    plan.costs.push_back(cost_of(problem, bin));
  }
  const std::vector<double>& costs = plan.costs;
  const size_t per_rank = plan.bins.size() / problem.ranks;
  std::vector<Integers> shares(problem.ranks);
  std::vector<double> totals(problem.ranks, 0.0);
  Integers dearest_first(costs.size());
  std::iota(dearest_first.begin(), dearest_first.end(), 0);
  const auto dearer = [&](int64_t a, int64_t b) { return costs[a] > costs[b]; };
  std::stable_sort(dearest_first.begin(), dearest_first.end(), dearer);
  for (const int64_t bin : dearest_first) {
    int64_t rank = -1;
    for (int64_t r = 0; r < problem.ranks; ++r) {
      if (shares[r].size() < per_rank && (rank < 0 || totals[r] < totals[rank])) rank = r;
    }
    shares[rank].push_back(bin);
    totals[rank] += costs[bin];
  }
  for (size_t i = 0; i < 4 * costs.size() && exchange(shares, totals, costs); ++i) {
  }
  for (int64_t rank = 0; rank < problem.ranks; ++rank) {
    for (const int64_t bin : shares[rank]) plan.rank_of_bin[bin] = rank;
  }
  plan.imbalance = imbalance_of(plan, problem.ranks);
  return plan;
}

// The same number of bins under a smaller capacity, where that evens the ranks and cuts nothing more.
Plan evened(
    const Problem& problem, const std::vector<Item>& items, const std::vector<Integers>& orders, const Packing& packing,
    Plan plan) {
  const auto count = static_cast<int64_t>(plan.bins.size());
  int64_t low = std::max<int64_t>(ceil_div(packing.tokens, count), 1), high = problem.capacity;
  for (int step = 0; step < kSmallerCapacities && plan.imbalance >= kEven && high > low; ++step) {
    const int64_t capacity = (low + high) / 2;
    bool better = false;
    for (const Integers& order : orders) {
      const auto candidate = attempt(items, order, capacity, count, packing.whole_up_to);
      if (!candidate || candidate->tokens > packing.tokens) continue;
      Plan dealt = deal(problem, *candidate);
      if (dealt.imbalance < plan.imbalance) {
        plan = std::move(dealt);
        better = true;
      }
    }
    (better ? high : low) = better ? capacity : capacity + 1;
  }
  return plan;
}

// A piece of a bin that may go elsewhere.
struct Offer {
  int64_t bin, index, group;
  double cost;
  int64_t tokens;
};

std::vector<Offer> offers_of(const Problem& problem, const Plan& plan, const Integers& share) {
  std::vector<Offer> offers;
  for (const int64_t bin : share) {
    for (size_t i = 0; i < plan.bins[bin].size(); ++i) {
      const Piece& piece = plan.bins[bin][i];
      offers.push_back(
          {bin, static_cast<int64_t>(i), piece.group, cost_of(problem, piece), tokens_of(problem, piece)});
    }
  }
  return offers;
}

bool holds(const Bin& bin, int64_t group) {
  const auto at = std::lower_bound(
      bin.begin(), bin.end(), group, [](const Piece& piece, int64_t value) { return piece.group < value; });
  return at != bin.end() && at->group == group;
}

// members are those of the given piece that go; none for all of them.
struct Swap {
  Offer give;
  std::optional<Offer> take;
  int64_t target;
  Integers members;
};

// What leaves least of the gap between the two ranks.
std::optional<Swap> best_swap(
    const Problem& problem, const Plan& plan, const Integers& tokens, const std::vector<Offer>& mine,
    const std::vector<Offer>& theirs, const Integers& targets, double gap) {
  double best = gap * (1 - kGain);
  std::optional<Swap> swap;
  for (const Offer& give : mine) {
    for (const int64_t target : targets) {
      const double left = std::abs(gap - 2 * give.cost);
      if (left < best && tokens[target] + give.tokens <= problem.capacity && !holds(plan.bins[target], give.group)) {
        best = left;
        swap = Swap{give, std::nullopt, target, {}};
      }
    }
    for (const Offer& take : theirs) {
      const double left = std::abs(gap - 2 * (give.cost - take.cost));
      if (left >= best || holds(plan.bins[take.bin], give.group) || holds(plan.bins[give.bin], take.group)) continue;
      const int64_t more = give.tokens - take.tokens;
      if (tokens[take.bin] + more <= problem.capacity && tokens[give.bin] - more <= problem.capacity) {
        best = left;
        swap = Swap{give, take, take.bin, {}};
      }
    }
  }
  return swap;
}

// The same for some of a piece's responses: the most cost that can go without making the other rank the dearer.
std::optional<Swap> best_cut(
    const Problem& problem, const Plan& plan, const Integers& tokens, const std::vector<Offer>& mine,
    const Integers& targets, double gap) {
  double best = gap * kLeastCut;
  std::optional<Swap> swap;
  for (const Offer& give : mine) {
    const int64_t prefix = problem.prefixes[give.group];
    const double again = cost_of(problem, Piece{give.group, {}});
    std::vector<std::pair<double, int64_t>> costs;
    for (const int64_t member : plan.bins[give.bin][give.index].members) {
      costs.emplace_back(again - cost_of(problem, Piece{give.group, {member}}), member);
    }
    std::sort(costs.begin(), costs.end());
    for (const int64_t target : targets) {
      const bool known = holds(plan.bins[target], give.group);
      const double goal = (known ? gap : gap - again) / 2;
      const int64_t room = problem.capacity - tokens[target] - (known || !problem.share_prefix ? 0 : prefix);
      Integers members;
      double gone = 0.0;
      int64_t used = 0;
      for (const auto& [negative, member] : costs) {
        const int64_t length = problem.lengths[problem.offsets[give.group] + member];
        const int64_t size = length + (problem.share_prefix ? 0 : prefix);
        if (gone - negative <= goal && used + size <= room && members.size() + 1 < costs.size()) {
          members.push_back(member);
          gone -= negative;
          used += size;
        }
      }
      if (gone > best) {
        best = gone;
        swap = Swap{give, std::nullopt, target, std::move(members)};
      }
    }
  }
  return swap;
}

Piece taken_out(Bin& bin, int64_t index) {
  Piece piece = std::move(bin[index]);
  bin.erase(bin.begin() + index);
  return piece;
}

// Leaves some members of a piece in its bin, and gives a piece of the others.
Piece cut_out(Piece& piece, const Integers& members) {
  const auto goes = [&](int64_t member) { return std::find(members.begin(), members.end(), member) != members.end(); };
  std::erase_if(piece.members, goes);
  return {piece.group, members};
}

// Pieces moved or swapped between bins of the dearest and of a cheaper rank, while that lowers the dearer of both; then
// responses of a piece.
Plan shifted(const Problem& problem, Plan plan) {
  std::vector<double> totals = rank_costs(plan, problem.ranks);
  std::vector<Integers> shares(problem.ranks);
  Integers tokens;
  for (size_t bin = 0; bin < plan.bins.size(); ++bin) {
    shares[plan.rank_of_bin[bin]].push_back(static_cast<int64_t>(bin));
    tokens.push_back(tokens_of(problem, plan.bins[bin]));
  }
  for (int step = 0; step < kShifts; ++step) {
    Integers ranks(problem.ranks);
    std::iota(ranks.begin(), ranks.end(), 0);
    std::stable_sort(ranks.begin(), ranks.end(), [&](int64_t a, int64_t b) { return totals[a] < totals[b]; });
    const int64_t dearest = ranks.back();
    ranks.pop_back();
    const double mean = mean_of(totals);
    if (totals[dearest] <= kEven * mean) break;
    const std::vector<Offer> mine = offers_of(problem, plan, shares[dearest]);
    std::optional<Swap> swap;
    int64_t other = 0;
    for (const int64_t rank : ranks) {
      other = rank;
      swap = best_swap(
          problem, plan, tokens, mine, offers_of(problem, plan, shares[rank]), shares[rank],
          totals[dearest] - totals[rank]);
      if (swap) break;
    }
    if (!swap && problem.split && totals[dearest] > kEvenEnough * mean) {
      other = ranks.front();
      swap = best_cut(problem, plan, tokens, mine, shares[other], totals[dearest] - totals[other]);
    }
    if (!swap) break;
    Bin &source = plan.bins[swap->give.bin], &target = plan.bins[swap->target];
    const int64_t index = swap->give.index;
    Piece piece = swap->members.empty() ? taken_out(source, index) : cut_out(source[index], swap->members);
    if (swap->take) source.push_back(taken_out(target, swap->take->index));
    target.push_back(std::move(piece));
    for (const auto& [bin, rank] : {std::pair{swap->give.bin, dearest}, std::pair{swap->target, other}}) {
      merge(plan.bins[bin]);
      const double before = plan.costs[bin];
      plan.costs[bin] = cost_of(problem, plan.bins[bin]);
      totals[rank] += plan.costs[bin] - before;
      tokens[bin] = tokens_of(problem, plan.bins[bin]);
    }
  }
  return plan;
}

Plan pack(const Problem& problem) {
  const std::vector<Item> items = items_of(problem);
  if (items.empty()) return {};
  const std::vector<Integers> orders = orders_of(items);
  const Packing best = fewest_bins(problem, items, orders);
  Plan plan = deal(problem, best);
  if (problem.ranks == 1) return plan;
  return shifted(problem, evened(problem, items, orders, best, std::move(plan)));
}

// prefixes int64 [G], lengths int64 [N], offsets int64 [G+1], vision float64 [G] -> pieces int64 [P, 3] (bin, group,
// responses), members int64 [N] in the order of the pieces, bins int64 [B, 2] (rank, tokens), costs float64 [B].
std::tuple<Tensor, Tensor, Tensor, Tensor> pack_groups(
    const Tensor& prefixes, const Tensor& lengths, const Tensor& offsets, const Tensor& vision, int64_t capacity,
    int64_t ranks, bool share_prefix, bool split, double token_cost, double pair_cost) {
  const Problem problem{
      prefixes.const_data_ptr<int64_t>(), lengths.const_data_ptr<int64_t>(), offsets.const_data_ptr<int64_t>(),
      vision.const_data_ptr<double>(), prefixes.numel(), capacity, ranks, share_prefix, split, token_cost, pair_cost};
  const Plan plan = pack(problem);

  int64_t count = 0;
  for (const Bin& bin : plan.bins) count += static_cast<int64_t>(bin.size());
  const auto bins = static_cast<int64_t>(plan.bins.size());
  Tensor pieces = torch::stable::new_empty(prefixes, {count, 3});
  Tensor members = torch::stable::new_empty(prefixes, {lengths.numel()});
  Tensor of_bins = torch::stable::new_empty(prefixes, {bins, 2});
  Tensor costs = torch::stable::new_empty(vision, {bins});
  auto* piece_out = pieces.mutable_data_ptr<int64_t>();
  auto* member_out = members.mutable_data_ptr<int64_t>();
  auto* bin_out = of_bins.mutable_data_ptr<int64_t>();
  for (int64_t bin = 0; bin < bins; ++bin) {
    for (const Piece& piece : plan.bins[bin]) {
      *piece_out++ = bin;
      *piece_out++ = piece.group;
      *piece_out++ = static_cast<int64_t>(piece.members.size());
      member_out = std::copy(piece.members.begin(), piece.members.end(), member_out);
    }
    *bin_out++ = plan.rank_of_bin[bin];
    *bin_out++ = tokens_of(problem, plan.bins[bin]);
  }
  std::copy(plan.costs.begin(), plan.costs.end(), costs.mutable_data_ptr<double>());
  return {pieces, members, of_bins, costs};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r4b_native, library) {
  library.def(
      "pack_groups(Tensor prefixes, Tensor lengths, Tensor offsets, Tensor vision, int capacity, int ranks, "
      "bool share_prefix, bool split, float token_cost, float pair_cost) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(r4b_native, CPU, library) { library.impl("pack_groups", TORCH_BOX(&pack_groups)); }
