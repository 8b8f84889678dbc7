import Devices
import EventLoop
import Glibc
import SimulatedXen
import Transport
import Virtqueue
import Xen

/// A fixed number of 4 KiB requests through many devices in turn, on one thread, for callgrind to count: see `profile`.
///
///     vxd-bench profile DEVICES BUCKETS REQUESTS read|write direct|bounced|io_uring
///
/// The first two are by libaio.
enum Profile {
  private static let depth = 32
  private static let fileBytes = 1 << 20

  /// A device with its guest: nothing is shared between two of them.
  private final class Lane {
    let device: InlineDevice
    let transport: MMIOTransport
    let driver: SimulatedDriver
    let pool: ForeignMappingPool
    let data: UInt64
    private let domain: SimulatedDomain

    init(_ index: Int, folder: String, buckets: Int, mode: String) throws {
      let path = "\(folder)/\(index).img"
      let raw = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
      guard raw >= 0, ftruncate(raw, off_t(Profile.fileBytes)) == 0 else { throw Errno.last }
      close(raw)
      domain = try SimulatedDomain(identifier: DomainID(index + 1), memoryBytes: (buckets + 3) << 21)
      let hypervisor = SimulatedHypervisor()
      hypervisor.add(domain)
      let handle = try hypervisor.open(DomainID(index + 1))
      pool = ForeignMappingPool(guest: handle, budgetBytes: 4 << 30, isStable: true)
      device = try InlineDevice(
        path: path, source: pool, copies: mode == "bounced", slots: Profile.depth,
        engine: LoadEngine(rawValue: mode) ?? .libaio)
      transport = MMIOTransport(device: device, line: SlotTable.slot(0).line(of: handle), onStatus: { _ in })
      driver = SimulatedDriver(registers: DirectRegisters(transport), memory: domain.memory, area: 1 << 20)
      try driver.start(wanted: [.indirectDescriptors, .eventIndex, .blockFlush])
      data = 3 << 21
    }

    func end() {
      transport.remove()
      device.finish()
      pool.close()
    }
  }

  static func run(_ arguments: [String]) throws {
    guard arguments.count == 5, let devices = Int(arguments[0]), let buckets = Int(arguments[1]),
      let requests = Int(arguments[2]), devices > 0, buckets > 0
    else {
      print("usage: vxd-bench profile DEVICES BUCKETS REQUESTS read|write direct|bounced|io_uring")
      exit(2)
    }
    let isWrite = arguments[3] == "write"
    var template = Array("/dev/shm/vxd-profile-XXXXXX".utf8CString)
    guard mkdtemp(&template) != nil else { throw Errno.last }
    let folder = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    var lanes: [Lane] = []
    for index in 0..<devices {
      lanes.append(try Lane(index, folder: folder, buckets: buckets, mode: arguments[4]))
    }
    // Every bucket is mapped and every path taken once before anything counts.
    for lane in lanes { for bucket in 0..<buckets { turn(lane, bucket, isWrite, buckets) } }
    for index in 0..<requests / depth { turn(lanes[index % devices], index / devices, isWrite, buckets) }
    for (index, lane) in lanes.enumerated() {
      lane.end()
      unlink("\(folder)/\(index).img")
    }
    rmdir(folder)
  }

  /// One batch: as many requests as the depth, each in another bucket.
  private static func turn(_ lane: Lane, _ start: Int, _ isWrite: Bool, _ buckets: Int) {
    for slot in 0..<depth {
      let place = lane.data + UInt64((start &+ slot &* 7) % buckets) << 21 + UInt64(slot) * 0x2000
      let header = lane.driver.memory.pointer(place)
      header.storeBytes(of: isWrite ? 1 : 0, as: UInt32.self)
      header.storeBytes(of: UInt64(slot * 8), toByteOffset: 8, as: UInt64.self)
      _ = lane.driver.add(
        [
          .init(place, 16, writable: false), .init(place + 4096, 4096, writable: !isWrite),
          .init(place + 16, 1, writable: true),
        ], indirect: true)
    }
    lane.driver.notify()
    var done = 0
    while done < depth {
      guard lane.driver.takeUsed() != nil else {
        lane.device.run()
        continue
      }
      done += 1
    }
  }
}
