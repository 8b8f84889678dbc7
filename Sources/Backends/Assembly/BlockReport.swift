package import Devices
package import Engines
package import EventLoop

/// What a running block device has to say to its supervisor.
package enum BlockReport: Sendable {
  /// The guest broke a queue: the device waits for a reset.
  case fault(DeviceFault)
  /// A queue stopped at an error (a negated errno) and waits for an operator's word.
  case held(queue: Int, Int)
  case resumed(queue: Int)
  /// The server of the store is out of reach; requests wait.
  case storeLost(String)
  case storeBack
  /// The store is gone for good (a negated errno): the device has stopped with its requests in its journals.
  case storeGone(Int)
}

/// Why a backend cannot start.
package enum StartFault: Error {
  case image(ImageFault)
  case host(Errno)
  /// What was saved of the device does not fit the backend.
  case state(String)

  package var message: String {
    switch self {
    case .image(let fault): fault.message
    case .state(let words): words
    case .host(let errno): "cannot start the device's threads: \(errno)"
    }
  }
}
