import Devices
package import Engines
package import EventLoop
import Glibc
package import Lifecycle
package import Virtqueue
package import Xen

/// One console device. Values are checked already.
package struct ConsoleSettings: DeviceSettings {
  package var restart = RestartPolicy()
  package var slot: UInt8?
  package var limits = RateLimits()
  package var offered: FeatureBits?
  package var transport: RegisterTransport?
  /// The first is the guest's console.
  package var ports: [ConsolePortSettings]

  package init(ports: [ConsolePortSettings]) { self.ports = ports }

  // MARK: DeviceSettings

  package static let type = VirtioType.console

  /// A guest that runs keeps the count of its ports.
  package mutating func keep(queueSizes: [UInt16]) {
    let count = max(1, queueSizes.count / 2 - 1)
    while ports.count < count { ports.append(ConsolePortSettings(name: "", isConsole: false)) }
    ports.removeLast(ports.count - count)
  }

  package func start(
    _ context: DeviceBackend.Context,
    completion: @escaping @Sendable (Result<DeviceBackend, StartFault>) -> Void
  ) -> [LoopThread] {
    ConsoleBackend.start(self, context) { completion($0.map { $0 }) }
  }

  /// What its ports remember.
  package func removeTraces(_ device: DeviceTraces) {
    guard let folder = device.consoleFolder else { return }
    for port in ports.indices { unlink(ConsoleBackend.historyPath(folder, device.fileName, port: port)) }
  }
}
