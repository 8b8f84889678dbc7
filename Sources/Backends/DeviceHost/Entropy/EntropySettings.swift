import Devices
package import EventLoop
package import JSON
package import Lifecycle
package import Virtqueue
package import Xen

/// One entropy device.
package struct EntropySettings: DeviceSettings {
  package var restart = RestartPolicy()
  package var slot: UInt8?
  package var limits = RateLimits()
  package var offered: FeatureBits?
  package var transport: RegisterTransport?

  package init() {}

  // MARK: DeviceSettings

  package static let type = VirtioType.entropy
  /// Those that all devices have.
  package static let options = OptionTable<EntropySettings>(commonRows)

  package init(options members: [JSONValue.Member], for owner: DeviceOwner, _ field: String) throws(SettingFault) {
    self.init()
    try Self.options.apply(members, to: &self, field)
  }

  package var optionTexts: [(name: String, value: String)] { Self.options.texts(self) }

  package func start(
    _ context: DeviceBackend.Context,
    completion: @escaping @Sendable (Result<DeviceBackend, StartFault>) -> Void
  ) -> [LoopThread] {
    EntropyBackend.start(self, context) { completion($0.map { $0 }) }
  }
}
