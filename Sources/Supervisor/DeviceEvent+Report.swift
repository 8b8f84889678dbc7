import DeviceHost
import Devices
import EventLoop
import Lifecycle

extension DeviceEvent.Report {
  /// A backend's report in the machine's terms, with words for operators.
  init(_ report: DeviceReport, of backend: DeviceBackend?) {
    switch report {
    case .fault(let fault): self = .fault(fault.message)
    case .storageGone(let result): self = .gone("the storage is gone (\(Errno(Int32(clamping: -result))))")
    case .held(let queue, let result):
      self = .held(
        queue: queue,
        "queue \(queue): the storage fails (\(Errno(Int32(clamping: -result)))); the guest waits for 'vxctl resume'")
    case .resumed(let queue): self = .resumed(queue: queue)
    case .storageLost(let reason): self = .lost(reason)
    case .storageBack: self = .back
    case .portsOpen(let mask):
      let open = (backend?.ports ?? []).enumerated().filter { ConsolePortBoard.bit(mask, $0.offset) }
      let names = open.map { $0.element.name.isEmpty ? "\($0.offset)" : $0.element.name }
      self = .ports(names.isEmpty ? "the guest has none open" : "the guest has open: \(names.joined(separator: ", "))")
    }
  }
}
