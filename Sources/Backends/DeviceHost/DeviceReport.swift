package import Devices
package import Engines
package import EventLoop

/// What a running device has to say to its supervisor.
package enum DeviceReport: Sendable {
  /// The guest broke a queue: the device waits for a reset.
  case fault(DeviceFault)
  /// A queue stopped at an error (a negated errno) and waits for an operator's word.
  case held(queue: Int, Int)
  case resumed(queue: Int)
  /// The server of the store is out of reach; requests wait.
  case storageLost(String)
  case storageBack
  /// What the device works with (an image, a tap) is gone for good (a negated errno): it has stopped, and what it had waits in the
  /// guest's queues.
  case storageGone(Int)
  /// Which ports of a console device the guest has open now: bit n is port n.
  case portsOpen(UInt64)
}

/// Why a backend cannot start.
package enum StartFault: Error {
  case image(ImageFault)
  case host(Errno)
  /// Something of the host that the device needs: what, and why it cannot be had.
  case resource(String)
  /// What was saved of the device does not fit the backend.
  case state(String)

  package var message: String {
    switch self {
    case .image(let fault): fault.message
    case .state(let words), .resource(let words): words
    case .host(let errno): "cannot start the device's threads: \(errno)"
    }
  }
}
