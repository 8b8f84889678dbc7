package import Devices
package import Engines
package import EventLoop
import Synchronization
package import Transport
package import Virtqueue

/// A running block device: its thread, engine, queue pump and what the transport sees of it.
///
/// The transport's calls (`VirtioDevice`) come from the guest's ioreq thread and are handed to the device's own thread, which
/// alone touches queue, engine and guest memory.
package final class BlockBackend: VirtioDevice, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: the properties below "data thread" are touched by the loop's thread only; all
  // others are immutable or made for sharing.

  package let deviceID: UInt32 = 2
  package let offeredFeatures: FeatureBits
  package let queueSizes: [UInt16]
  package let configuration: ConfigurationSpace
  package let counters = BlockCounters()
  package let geometry: BlockGeometry
  /// Whether data goes past the page cache.
  package let isDirect: Bool

  private let thread: LoopThread
  private let source: any GuestMemorySource
  private let onFault: @Sendable (DeviceFault) -> Void
  private let kick: EventDescriptor
  /// Set while a kick is on its way: more of them cost no system call.
  private let kicked = Atomic<Bool>(false)

  // Data thread
  private let engine: AIOEngine
  private var pump: BlockPump?
  private var signals: (any TransportSignals)?
  private var tokens: [EventLoop.Token] = []

  /// Why a backend cannot start.
  package enum StartFault: Error {
    case image(ImageFault)
    case host(Errno)

    package var message: String {
      switch self {
      case .image(let fault): fault.message
      case .host(let errno): "cannot start the device's thread: \(errno)"
      }
    }
  }

  /// Opens the image and builds the device on a thread of its own; nothing here blocks the caller.
  ///
  /// - Parameters:
  ///   - name: the device, for error messages and the thread's name.
  ///   - onFault: called on the device's thread when the guest broke its queue.
  ///   - completion: called on the device's thread, or on the caller's when no thread could be made.
  package static func start(
    _ settings: BlockSettings, name: String, source: any GuestMemorySource,
    onFault: @escaping @Sendable (DeviceFault) -> Void,
    completion: @escaping @Sendable (Result<BlockBackend, StartFault>) -> Void
  ) -> LoopThread? {
    do throws(Errno) {
      let thread = try LoopThread(name: "vxd-\(name)")
      thread.loop.enqueue {
        do throws(StartFault) {
          completion(.success(try BlockBackend(settings, name, thread, source, onFault)))
        } catch {
          completion(.failure(error))
        }
      }
      return thread
    } catch {
      completion(.failure(.host(error)))
      return nil
    }
  }

  private init(
    _ settings: BlockSettings, _ name: String, _ thread: LoopThread, _ source: any GuestMemorySource,
    _ onFault: @escaping @Sendable (DeviceFault) -> Void
  ) throws(StartFault) {
    self.thread = thread
    self.source = source
    self.onFault = onFault
    do throws(ImageFault) {
      let image = try RawImage(
        path: settings.path, holder: name, readOnly: settings.readOnly, discard: settings.discard,
        direct: settings.direct)
      engine = try AIOEngine(image: image, depth: Int(settings.queueSize))
    } catch {
      throw .image(error)
    }
    isDirect = engine.image.isDirect
    geometry = engine.geometry
    queueSizes = [settings.queueSize]
    offeredFeatures = BlockConfiguration.features(engine.geometry)
    configuration = ConfigurationSpace(BlockConfiguration.bytes(engine.geometry))
    do throws(Errno) {
      kick = try EventDescriptor()
    } catch {
      throw .host(error)
    }
    // The layout of the idle queue is one that `validate` accepts.
    pump = try? BlockPump(
      engine: engine, source: source, counters: counters, serial: Array(settings.serial.utf8),
      queueSize: Int(settings.queueSize), bounceBytes: settings.bounceBytes,
      copiesAlways: settings.copiesAlways)
    do throws(Errno) {
      tokens.append(
        try thread.loop.onReadable(kick.raw) { [unowned self] in
          kick.drain()
          kicked.store(false, ordering: .releasing)
          run()
        })
      tokens.append(
        try thread.loop.onReadable(engine.readiness) { [unowned self] in
          engine.acknowledgeReadiness()
          run()
        })
    } catch {
      throw .host(error)
    }
  }

  // MARK: VirtioDevice, on the ioreq thread

  package func accepts(_ features: FeatureBits) -> Bool { true }

  package func activate(features: FeatureBits, layouts: [QueueLayout?], signals: any TransportSignals) {
    thread.loop.enqueue { [self] in
      self.signals = signals
      guard let layout = layouts.first ?? nil else { return }
      do throws(DeviceFault) {
        try pump?.activate(layout: layout, maximumSize: queueSizes[0], features: features, source: source)
      } catch {
        return fail(error)
      }
      // What was notified before the queue was live, or before this daemon was, must not be lost.
      run()
      signals.interruptForUsedBuffers()
    }
  }

  package func notify(queue: Int) {
    counters.notifications.add(1)
    wake()
  }

  private func wake() {
    if !kicked.exchange(true, ordering: .acquiringAndReleasing) { kick.signal() }
  }

  package func reset() {
    thread.perform { [self] in
      pump?.deactivate()
      signals = nil
    }
  }

  package func configurationWritten(offset: Int, bytes: [UInt8]) {
    // No writable field is offered (CONFIG_WCE is not).
  }

  // MARK: Data thread

  private func run() {
    do throws(DeviceFault) {
      if case .more? = try pump?.run(signals: signals ?? Self.silence) { wake() }
    } catch {
      fail(error)
    }
  }

  private func fail(_ fault: DeviceFault) {
    pump?.deactivate()
    signals?.needReset()
    signals = nil
    onFault(fault)
  }

  /// For completions that come while no driver is there: nobody is to be told.
  private final class Silence: TransportSignals {
    func interruptForUsedBuffers() {}
    func interruptForConfiguration() {}
    func needReset() {}
  }

  private static let silence = Silence()

  // MARK: End

  /// Ends the device: nothing touches guest memory any more when `completion` runs, and the image is closed.
  ///
  /// Waits, on the device's thread, for what the kernel still works on. The caller joins the thread afterwards.
  package func stop(completion: @escaping @Sendable () -> Void) {
    thread.loop.enqueue { [self] in
      signals = nil
      pump?.deactivate()
      pump?.drain()
      pump = nil
      for token in tokens { thread.loop.remove(token) }
      tokens = []
      completion()
    }
  }
}
