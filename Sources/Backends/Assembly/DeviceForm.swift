package import Devices
package import EventLoop
package import Lifecycle
package import Transport
package import Virtqueue

/// Options that devices of every type have.
package protocol DeviceSettings: Equatable, Sendable {
  /// What its supervisor does when the backend fails.
  var restart: RestartPolicy { get set }
  /// What the device may use.
  var limits: RateLimits { get set }
  /// Offer exactly these features: what the driver of a running device knows.
  var offered: FeatureBits? { get set }
}

/// A device of one of the types that there are, with its options. Values are checked already.
package enum DeviceForm: Equatable, Sendable {
  case disk(BlockSettings)
  case network(NetSettings)
  case console(ConsoleSettings)
  case entropy(EntropySettings)

  /// The type's name.
  package var typeName: String {
    switch self {
    case .disk: "disk"
    case .network: "network"
    case .console: "console"
    case .entropy: "entropy"
    }
  }

  package var disk: BlockSettings? {
    get { if case .disk(let settings) = self { settings } else { nil } }
    set { if let newValue, case .disk = self { self = .disk(newValue) } }
  }

  /// What all types have.
  package var common: any DeviceSettings {
    switch self {
    case .disk(let settings): settings
    case .network(let settings): settings
    case .console(let settings): settings
    case .entropy(let settings): settings
    }
  }

  package mutating func set(limits: RateLimits) { change { $0.limits = limits } }

  private mutating func change(_ body: (inout any DeviceSettings) -> Void) {
    var settings = common
    body(&settings)
    switch settings {
    case let settings as BlockSettings: self = .disk(settings)
    case let settings as NetSettings: self = .network(settings)
    case let settings as ConsoleSettings: self = .console(settings)
    case let settings as EntropySettings: self = .entropy(settings)
    default: break
    }
  }

  /// Keeps what the guest's driver knows of a device that runs.
  package mutating func keep(_ profile: DeviceProfile) {
    change { $0.offered = profile.offeredFeatures }
    switch self {
    case .disk(var settings):
      settings.queues = profile.queueSizes.count
      settings.threads = min(settings.threads, settings.queues)
      settings.queueSize = profile.queueSizes.first ?? settings.queueSize
      self = .disk(settings)
    case .network(var settings):
      settings.keep(queueSizes: profile.queueSizes)
      self = .network(settings)
    case .console(var settings):
      settings.keep(queueSizes: profile.queueSizes)
      self = .console(settings)
    case .entropy: break
    }
  }

  /// Starts a backend, see `DeviceBackend.start`.
  ///
  /// - Parameter decorate: puts something between a disk's queue and its engine: faults in tests.
  package func start(
    _ surroundings: DeviceBackend.Surroundings,
    decorate: @escaping @Sendable (any BlockEngine, _ queue: Int) -> any BlockEngine,
    completion: @escaping @Sendable (Result<DeviceBackend, StartFault>) -> Void
  ) -> [LoopThread] {
    switch self {
    case .disk(let settings):
      BlockBackend.start(settings, surroundings, decorate: decorate) { completion($0.map { $0 }) }
    case .network(let settings): NetBackend.start(settings, surroundings) { completion($0.map { $0 }) }
    case .console(let settings): ConsoleBackend.start(settings, surroundings) { completion($0.map { $0 }) }
    case .entropy(let settings): EntropyBackend.start(settings, surroundings) { completion($0.map { $0 }) }
    }
  }
}

extension BlockSettings: DeviceSettings {}

extension DeviceState.Shape {
  /// For devices that need no journal: their rings say where they go on.
  init(unjournaled profile: DeviceProfile) { self.init(profile: profile, slotCount: 1, chainLimit: 1) }
}

extension DeviceBackend {
  /// Makes something that fails as rings or the host do.
  static func make<Value>(_ body: () throws -> Value) throws(StartFault) -> Value {
    do {
      return try body()
    } catch let error as Errno {
      throw .host(error)
    } catch let error as StartFault {
      throw error
    } catch {
      throw .state("a queue cannot be made: \(error)")
    }
  }
}
