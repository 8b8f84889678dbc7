import Transport

/// The PCI functions that one ioreq server answers for: which accesses belong to which of them, and which addresses are claimed from Xen
/// for their BARs. Confined to the guest's ioreq thread.
///
/// The guest moves BARs as it likes. Claimed is what a real bridge would send to a function: addresses of the hole below 4 GiB that are
/// no memory of the guest, each for one function only; of two that want the same the one with the lower number has it.
final class PCIRoutes: PCIDecoder {
  /// Where hvmloader places BARs at most, and ends (xen: tools/firmware/hvmloader/config.h, PCI_MEM_END). Above it are the slots of
  /// virtio-mmio, the interrupt controllers, and Xen's special pages.
  static let hole: ClosedRange<UInt64> = 0x8000_0000...0xfbff_ffff

  private struct Seat {
    let address: PCIAddress
    let transport: PCITransport
    /// What the function decodes, where it may.
    var wanted: ClosedRange<UInt64>?
  }

  private let guest: any GuestHandle
  private let server: UInt16
  /// An earlier process may have claimed the same.
  private let isAdopted: Bool
  /// By address, the lowest first.
  private var seats: [Seat] = []
  private var claimed: Set<ClosedRange<UInt64>> = []

  init(guest: any GuestHandle, server: UInt16, isAdopted: Bool) {
    self.guest = guest
    self.server = server
    self.isAdopted = isAdopted
  }

  // MARK: Functions

  /// Puts a function on the bus; the guest finds it when it scans the bus next.
  func attach(_ transport: PCITransport, at address: PCIAddress) throws(XenError) {
    if !seats.contains(where: { $0.address == address }) { try claim(.configuration(address)) }
    seats.removeAll { $0.address == address }
    seats.append(Seat(address: address, transport: transport, wanted: permitted(transport.pci.function.memory)))
    seats.sort { $0.address < $1.address }
    transport.decoder = self
    settle {}
  }

  /// Takes a function off the bus: its configuration space reads as ones then.
  func detach(_ address: PCIAddress) {
    guard let index = seats.firstIndex(where: { $0.address == address }) else { return }
    seats[index].transport.remove()
    seats.remove(at: index)
    settle {}
    try? guest.release(.configuration(address), from: server)
  }

  /// The same, unless a driver is at work with it.
  ///
  /// - Returns: whether it is not there.
  func detachUnused(_ address: PCIAddress) -> Bool {
    if seats.first(where: { $0.address == address })?.transport.currentStatus.isEmpty == false { return false }
    detach(address)
    return true
  }

  func removeAll() {
    for seat in seats { seat.transport.remove() }
    seats = []
  }

  /// Gives everything back to Xen. Errors are expected when the guest is being destroyed.
  func close() {
    for range in claimed { try? guest.release(.memory(range), from: server) }
    claimed = []
  }

  private func claim(_ range: AccessRange) throws(XenError) {
    do throws(XenError) {
      try guest.claim(range, for: server)
    } catch {
      guard isAdopted, error.errno.code == 17 /* EEXIST */ else { throw error }
    }
  }

  // MARK: Accesses

  /// Whose memory an address is, and where in its BAR.
  func target(at address: UInt64) -> (transport: PCITransport, offset: UInt64)? {
    for seat in seats {
      if let range = seat.wanted, range.contains(address) { return (seat.transport, address &- range.lowerBound) }
    }
    return nil
  }

  /// - Parameter place: of an access: the function's number above, the register in the low 32 bits (xen: common/ioreq.c).
  func readConfiguration(_ place: UInt64, _ width: Int) -> UInt64 {
    guard let transport = function(place) else { return .max }
    return transport.readConfiguration(offset: Int(place & 0xffff_ffff), width: width)
  }

  func writeConfiguration(_ place: UInt64, _ width: Int, _ value: UInt64) {
    function(place)?.writeConfiguration(offset: Int(place & 0xffff_ffff), width: width, value: value)
  }

  private func function(_ place: UInt64) -> PCITransport? {
    let number = UInt32(truncatingIfNeeded: place >> 32)
    return seats.first { $0.address.number == number }?.transport
  }

  // MARK: BARs

  func decode(_ range: ClosedRange<UInt64>?, of transport: PCITransport, save: () -> Void) {
    guard let index = seats.firstIndex(where: { $0.transport === transport }) else { return save() }
    seats[index].wanted = permitted(range)
    settle(save)
  }

  /// A range that may be claimed; nil for one that may not.
  private func permitted(_ range: ClosedRange<UInt64>?) -> ClosedRange<UInt64>? {
    guard let range, Self.hole.lowerBound <= range.lowerBound, range.upperBound <= Self.hole.upperBound,
      !isMemory(range)
    else { return nil }
    return range
  }

  /// Whether the guest has memory at one of the addresses, the frame buffer of a graphics card included: what can be mapped is memory.
  private func isMemory(_ range: ClosedRange<UInt64>) -> Bool {
    let frames = (range.lowerBound >> 12...range.upperBound >> 12).map { $0 }
    var errors = [Int32](repeating: 1, count: frames.count)
    guard let start = guest.map(frames: frames, count: frames.count, errors: &errors) else { return false }
    guest.unmap(start, count: frames.count)
    return errors.contains(0)
  }

  /// Which of the ranges are claimed: of those that overlap, the first.
  static func plan(_ wanted: [ClosedRange<UInt64>?]) -> [ClosedRange<UInt64>?] {
    var granted: [ClosedRange<UInt64>] = []
    return wanted.map { range in
      guard let range, !granted.contains(where: { $0.overlaps(range) }) else { return nil }
      granted.append(range)
      return range
    }
  }

  /// Brings what is claimed in line with what is wanted, see `PCIDecoder.decode` for the order.
  private func settle(_ save: () -> Void) {
    let plan = Self.plan(seats.map(\.wanted))
    let ranges = Set(plan.compactMap { $0 })
    for range in claimed.subtracting(ranges) { try? guest.release(.memory(range), from: server) }
    claimed.formIntersection(ranges)
    save()
    for (seat, range) in zip(seats, plan) {
      if let range, !claimed.contains(range) {
        do throws(XenError) {
          try claim(.memory(range))
          claimed.insert(range)
        } catch {
          // The guest reads ones there, as without the function; operators see it by `isClaimed`.
        }
      }
      seat.transport.isClaimed = range.map { claimed.contains($0) } ?? false
    }
  }
}
